// The part of a CUDA runtime that has to give something back, for a device that is not there. Kernels do nothing.
//
// "Device" memory is a stretch of address space that the kernel fills with zeros page by page as it is touched, so tensors
// of any size cost what is written to them: little, as no kernel writes. Pinned memory is a second stretch. Addresses are
// given out once and never again, so that whose memory a pointer names is a comparison.

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define CAPACITY (80ULL << 30) // bytes of the device
#define DEVICE_SPACE (1ULL << 40)
#define PINNED_SPACE (1ULL << 36)
#define PAGE 4096
#define TOUCHED (1 << 20) // copies and fills within the device are left out from this size on

enum { LAUNCHES, PRODUCTS, WAITS, TO_HOST, TO_DEVICE, TO_DEVICE_UNPINNED, GRAPHS, COUNTERS };
unsigned long null_counters[COUNTERS];
#define COUNT(which) __sync_fetch_and_add(&null_counters[which], 1)

struct space {
  char *start;
  size_t length, given, in_use;
};
static struct space device, pinned;

__attribute__((constructor)) static void reserve(void) {
  struct space *both[] = {&device, &pinned};
  size_t lengths[] = {DEVICE_SPACE, PINNED_SPACE};
  for (int i = 0; i < 2; i++) {
    void *start = mmap(NULL, lengths[i], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
      perror("null device: no address space");
      abort();
    }
    *both[i] = (struct space){start, lengths[i], 0, 0};
  }
}

static int within(struct space *s, const void *p) { return (char *)p >= s->start && (char *)p < s->start + s->length; }

// The page before each block holds its size.
static cudaError_t take(struct space *s, void **where, size_t size, size_t limit) {
  size = (size + PAGE - 1) / PAGE * PAGE;
  *where = NULL;
  if (!size)
    return cudaSuccess;
  if (__sync_add_and_fetch(&s->in_use, size) > limit) {
    __sync_sub_and_fetch(&s->in_use, size);
    return cudaErrorMemoryAllocation;
  }
  size_t at = __sync_fetch_and_add(&s->given, size + PAGE);
  if (at + size + PAGE > s->length)
    return cudaErrorMemoryAllocation;
  *(size_t *)(s->start + at) = size;
  *where = s->start + at + PAGE;
  return cudaSuccess;
}

static cudaError_t give_back(struct space *s, void *p) {
  if (p && within(s, p)) {
    char *header = (char *)p - PAGE;
    size_t size = *(size_t *)header;
    madvise(header, size + PAGE, MADV_DONTNEED);
    __sync_sub_and_fetch(&s->in_use, size);
  }
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t n) { return take(&device, p, n, CAPACITY); }
cudaError_t cudaFree(void *p) { return give_back(&device, p); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return take(&pinned, p, n ? n : 1, PINNED_SPACE); }
cudaError_t cudaFreeHost(void *p) { return give_back(&pinned, p); }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *total = CAPACITY;
  *available = CAPACITY - device.in_use;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  int here = within(&device, p), host = within(&pinned, p);
  memset(a, 0, sizeof *a);
  a->type = here ? cudaMemoryTypeDevice : host ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->devicePointer = here || host ? (void *)p : NULL;
  a->hostPointer = host ? (void *)p : NULL;
  return cudaSuccess;
}

// Copies and fills ----------------------------------------------------------------------------------------------------

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) {
  int to_device = within(&device, to), from_device = within(&device, from);
  if (from_device && !to_device)
    COUNT(TO_HOST);
  if (to_device && !from_device)
    COUNT(within(&pinned, from) ? TO_DEVICE : TO_DEVICE_UNPINNED);
  if (!(to_device && from_device) || n < TOUCHED)
    memmove(to, from, n);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
  COUNT(WAITS);
  return cudaMemcpyAsync(to, from, n, kind, NULL);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_step, const void *from, size_t from_step, size_t n, size_t rows,
                              enum cudaMemcpyKind kind, cudaStream_t s) {
  while (rows--)
    memmove((char *)to + rows * to_step, (const char *)from + rows * from_step, n);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t s) {
  if (n < TOUCHED)
    memset(p, value, n);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *p, int value, size_t n) { return cudaMemsetAsync(p, value, n, NULL); }

// Facts of an H100 SXM, from its data sheet and the CUDA programming guide ---------------------------------------------

static const struct {
  int attribute, value;
} FACTS[] = {
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
    {cudaDevAttrMaxRegistersPerBlock, 1 << 16},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxBlockDimX, 1024},
    {cudaDevAttrMaxGridDimX, INT32_MAX},
    {cudaDevAttrMaxGridDimY, UINT16_MAX},
    {cudaDevAttrMaxGridDimZ, UINT16_MAX},
    {cudaDevAttrWarpSize, 32},
};

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int ordinal) {
  *value = 1;
  for (unsigned i = 0; i < sizeof FACTS / sizeof *FACTS; i++)
    if (FACTS[i].attribute == (int)attribute)
      *value = FACTS[i].value;
  return cudaSuccess;
}

static int fact(enum cudaDeviceAttr attribute) {
  int value;
  cudaDeviceGetAttribute(&value, attribute, 0);
  return value;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int ordinal) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 80GB HBM3, null");
  p->totalGlobalMem = CAPACITY;
  p->major = fact(cudaDevAttrComputeCapabilityMajor);
  p->minor = fact(cudaDevAttrComputeCapabilityMinor);
  p->multiProcessorCount = fact(cudaDevAttrMultiProcessorCount);
  p->sharedMemPerBlock = fact(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = fact(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = fact(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->regsPerBlock = p->regsPerMultiprocessor = fact(cudaDevAttrMaxRegistersPerBlock);
  p->maxThreadsPerMultiProcessor = fact(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxThreadsPerBlock = fact(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = INT32_MAX;
  p->maxGridSize[1] = p->maxGridSize[2] = UINT16_MAX;
  p->maxBlocksPerMultiProcessor = p->warpSize = 32;
  p->l2CacheSize = 50 << 20;
  p->memoryBusWidth = 5120;
  p->totalConstMem = 1 << 16;
  p->textureAlignment = 512;
  p->memPitch = INT32_MAX;
  p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = p->cooperativeLaunch = p->managedMemory = 1;
  return cudaSuccess;
}

#define GIVES(name, type, arguments, value)                                                                            \
  cudaError_t name arguments {                                                                                         \
    *out = (type)(value);                                                                                              \
    return cudaSuccess;                                                                                                \
  }
GIVES(cudaGetDeviceCount, int, (int *out), 1)
GIVES(cudaGetDevice, int, (int *out), 0)
GIVES(cudaDriverGetVersion, int, (int *out), CUDART_VERSION)
GIVES(cudaRuntimeGetVersion, int, (int *out), CUDART_VERSION)
GIVES(cudaDeviceCanAccessPeer, int, (int *out, int a, int b), 0)
GIVES(cudaStreamGetPriority, int, (cudaStream_t s, int *out), 0)
GIVES(cudaEventElapsedTime, float, (float *out, cudaEvent_t a, cudaEvent_t b), 1.0f)
GIVES(cudaGetSymbolAddress, void *, (void **out, const void *symbol), symbol)
GIVES(__cudaGetKernel, cudaKernel_t, (cudaKernel_t *out, const void *f), f)
GIVES(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int,
      (int *out, const void *f, int threads, size_t shared, unsigned flags), 2)

const char *cudaGetErrorString(cudaError_t e) { return "an error of the null device"; }
const char *cudaGetErrorName(cudaError_t e) { return "null"; }
cudaError_t cudaSetDevice(int ordinal) { return ordinal ? cudaErrorInvalidDevice : cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char *text, int n, int ordinal) {
  snprintf(text, n, "0000:01:00.0");
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->ptxVersion = a->binaryVersion = 90;
  return cudaSuccess;
}

// Streams, events, launches -------------------------------------------------------------------------------------------

static void *handle(void) {
  static uintptr_t last = PAGE;
  return (void *)__sync_add_and_fetch(&last, 16);
}
GIVES(cudaStreamCreate, cudaStream_t, (cudaStream_t *out), handle())
GIVES(cudaStreamCreateWithFlags, cudaStream_t, (cudaStream_t *out, unsigned flags), handle())
GIVES(cudaStreamCreateWithPriority, cudaStream_t, (cudaStream_t *out, unsigned flags, int priority), handle())
GIVES(cudaEventCreate, cudaEvent_t, (cudaEvent_t *out), handle())
GIVES(cudaEventCreateWithFlags, cudaEvent_t, (cudaEvent_t *out, unsigned flags), handle())

static cudaError_t counted(int which) {
  COUNT(which);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) { return counted(WAITS); }
cudaError_t cudaDeviceSynchronize(void) { return counted(WAITS); }
cudaError_t cudaEventSynchronize(cudaEvent_t e) { return counted(WAITS); }

// One recording at a time, of one stream. A graph that is launched is counted, not what it holds.
static cudaStream_t recorded;
static unsigned long long recordings;

static enum cudaStreamCaptureStatus status_of(cudaStream_t s) {
  return recorded && recorded == s ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
GIVES(cudaStreamIsCapturing, enum cudaStreamCaptureStatus, (cudaStream_t s, enum cudaStreamCaptureStatus *out),
      status_of(s))

cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  recorded = s;
  recordings++;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  recorded = NULL;
  *graph = handle();
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  *status = status_of(s);
  if (id)
    *id = recordings;
  return cudaSuccess;
}

GIVES(cudaGraphGetNodes, size_t, (cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *out), 1)
GIVES(cudaGraphInstantiate, cudaGraphExec_t, (cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags),
      handle())
GIVES(cudaGraphInstantiateWithFlags, cudaGraphExec_t,
      (cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags), handle())
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t s) { return counted(GRAPHS); }

cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) {
  return counted(LAUNCHES);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) {
  return counted(LAUNCHES);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return counted(LAUNCHES); }

// The driver's symbols, which torch looks up by name.
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_GLOBAL);
  *f = driver ? dlsym(driver, name) : NULL;
  if (result)
    *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// What compiled kernels call as they are loaded, and around `kernel<<<grid, block, shared, stream>>>`.
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} call;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  call.grid = grid;
  call.block = block;
  call.shared = shared;
  call.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *(void **)stream = call.stream;
  return cudaSuccess;
}

static void *binary[1];
void **__cudaRegisterFatBinary(void *image) { return binary; }
void __cudaRegisterFatBinaryEnd(void **h) {}
void __cudaUnregisterFatBinary(void **h) {}
void __cudaRegisterVar(void **h, char *a, char *b, const char *c, int d, size_t e, int f, int g) {}
void __cudaRegisterFunction(void **h, const char *a, char *b, const char *c, int d, void *e, void *f, void *g, void *i,
                            int *j) {}
char __cudaInitModule(void **h) { return 1; }
