"""Build the null device: a CUDA runtime, cuBLAS and driver that succeed and compute nothing.

    python -m tests.gpu.null.build OUT

For the torch of this Python, which must be a CUDA build (CUDA 13). Needs gcc, binutils and the headers of
nvidia-cuda-runtime; no toolkit, no GPU, and none of the libraries of 2 GB that torch asks for: those that are not
installed are stood in for too. `runtime.c` holds what must give something back; every other symbol becomes a function
that returns success. Raises SystemExit, in one line, where something is missing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = (
    *("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg", "torch_cpu", "torch_nvshmem"),
    *("caffe2_nvrtc", "torch_global_deps"),
)
OTHERS = re.compile(r"(cudnn|nccl|cufft|cusparse|cusolver|curand|nvrtc|cupti|nvshmem|cuFile)[A-Z_a-z]")
HEADER = (
    "extern unsigned long null_counters[];\n#define COUNTED(which) __sync_fetch_and_add(&null_counters[which], 1)\n"
)
LAUNCH, PRODUCT = "COUNTED(0);", "COUNTED(0); COUNTED(1);"

# Arguments and body of the functions that give something back. torch asks that cuDNN be no older than what it was built
# for: 9.99. cuBLASLt's heuristic fills 64 bytes of an opaque algorithm, then its workspace, state, waves and 4 reserved
# numbers.
GIVEN = {
    "cudnnGetVersion": "unsigned long {}(void) {{ return 99900; }}",
    "cudnnGetProperty": "int {}(int which, int *out) {{ *out = which == 0 ? 9 : which == 1 ? 99 : 0; return 0; }}",
    "cublasLtGetVersion": "unsigned long {}(void) {{ return 130001; }}",
    "cublasLtMatmulAlgoGetHeuristic": "int {}(void *a, void *b, void *c, void *d, void *e, void *f, void *g,"
    " int wanted, void *out, int *found) {{ __builtin_memset(out, 0, 96); *found = 1; return 0; }}",
    "cublasGetMathMode": "int {}(void *a, int *out) {{ *out = 0; return 0; }}",
    "cublasGetPointerMode_v2": "int {}(void *a, int *out) {{ *out = 0; return 0; }}",
}
SUCCESS = "int {}(void) {{ return 0; }}"
DRIVER = {
    "cuDeviceGetCount": "int {}(int *out) {{ *out = 1; return 0; }}",
    "cuDeviceGet": "int {}(int *out, int a) {{ *out = 0; return 0; }}",
    "cuDriverGetVersion": "int {}(int *out) {{ *out = 13000; return 0; }}",
    "cuDeviceGetAttribute": "int {}(int *out, int a, int b) {{ extern int cudaDeviceGetAttribute(int *, int, int);"
    " return cudaDeviceGetAttribute(out, a, b); }}",
    "cuDevicePrimaryCtxGetState": "int {}(int a, unsigned *flags, int *out) {{ *flags = 0; *out = 1; return 0; }}",
    "cuDevicePrimaryCtxRetain": "int {}(void **out, int a) {{ *out = (void *)16; return 0; }}",
    "cuCtxGetCurrent": "int {}(void **out) {{ *out = (void *)16; return 0; }}",
    "cuCtxGetDevice": "int {}(int *out) {{ *out = 0; return 0; }}",
    "cuModuleLoadData": "int {}(void **out, const void *a) {{ *out = (void *)32; return 0; }}",
    "cuModuleGetFunction": "int {}(void **out, void *a, const char *b) {{ *out = (void *)48; return 0; }}",
    # 0: largest block, 4: registers
    "cuFuncGetAttribute": "int {}(int *out, int a, void *b) {{ *out = a == 0 ? 1024 : a == 4 ? 64 : 0; return 0; }}",
    "cuGetErrorString": 'int {}(int a, const char **out) {{ *out = "null"; return 0; }}',
    "cuPointerGetAttribute": "int {}(void *out, int a, unsigned long p) {{ *(unsigned long *)out = p; return 0; }}",
    "cuOccupancyMaxActiveClusters": "int {}(int *out, void *a, void *b) {{ *out = 1; return 0; }}",
    **dict.fromkeys(
        ("cuLaunchKernel", "cuLaunchKernelEx", "cuLaunchCooperativeKernel"),
        "int {}(void) {{ " + LAUNCH + " return 0; }}",
    ),
}
# What torch and Triton look up by name, so that no library lists it.
# fmt: off
BY_NAME = [
    "cuInit", "cuGetErrorName", "cuGetProcAddress_v2", "cuCtxSetCurrent", "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2", "cuCtxSynchronize", "cuCtxGetLimit", "cuCtxSetLimit", "cuStreamGetCtx",
    "cuStreamSynchronize", "cuMemAlloc_v2", "cuMemFree_v2", "cuMemcpyDtoH_v2", "cuMemcpyHtoD_v2", "cuModuleLoad",
    "cuModuleUnload", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuTensorMapEncodeTiled",
    "cuTensorMapEncodeIm2col",
]
# fmt: on


def wanted(library: Path) -> set[str]:
    """Symbols that a library expects of others."""
    if not library.exists():
        return set()
    listing = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}


def of_cublas(name: str) -> str:
    if name in GIVEN:
        return GIVEN[name]
    if "Create" in name:
        return "int {}(void **out) {{ *out = (void *)64; return 0; }}"
    if re.search(r"[gG]em|Matmul$", name):
        return "int {}(void) {{ " + PRODUCT + " return 0; }}"
    return SUCCESS


def write_stubs(torch_lib: Path, out: Path) -> None:
    """OUT/rest.c, of the runtime and cuBLAS, and OUT/driver.c."""
    names = set().union(*(wanted(torch_lib / f"lib{name}.so") for name in LIBRARIES))
    own = set(re.findall(r"\b(?:__)?cuda[A-Z]\w+(?=\(|, )", (HERE / "runtime.c").read_text(encoding="utf-8")))
    runtime = sorted(name for name in names - own if re.match(r"(__)?cuda[A-Z]", name))
    cublas = sorted(name for name in names if name.startswith("cublas"))
    others = sorted(name for name in names if OTHERS.match(name))
    lines = [HEADER, *(GIVEN.get(name, SUCCESS).format(name) for name in (*runtime, *others))]
    lines += [of_cublas(name).format(name) for name in cublas]
    (out / "rest.c").write_text("\n".join(lines) + "\n", encoding="utf-8")
    linked = {name for name in wanted(torch_lib / "libcaffe2_nvrtc.so") if re.match(r"cu[A-Z]", name)}
    driver = sorted(linked | DRIVER.keys() | set(BY_NAME))
    lines = [HEADER, *(DRIVER.get(name, SUCCESS).format(name) for name in driver)]
    (out / "driver.c").write_text("\n".join(lines) + "\n", encoding="utf-8")


def missing_libraries(torch_lib: Path) -> list[str]:
    """File names of NVIDIA's libraries that torch's ask for and no wheel beside torch brings."""
    asked: set[str] = set()
    for name in LIBRARIES:
        command = ["readelf", "-d", torch_lib / f"lib{name}.so"]
        listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        asked |= set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl)\w*\.so\.\d+)\]", listing))
    there = {path.name for path in torch_lib.parents[1].glob("nvidia/**/*.so.*")}
    return sorted(asked - there - {"libcuda.so.1"})


def header_folders(packages: list[Path]) -> list[Path]:
    """Folders of the CUDA headers among installed wheels. Triton's copy of the first is of another release."""
    found = []
    for header in ("cuda_runtime_api.h", "crt/host_defines.h"):
        places = [place for root in packages for place in sorted(root.glob(f"nvidia/**/include/{header}"))]
        if not places and header.startswith("crt/"):  # some releases leave these to the compiler's package
            places = [place for root in packages for place in sorted(root.glob(f"triton/**/include/{header}"))]
        if not places:
            raise SystemExit(f"null device: no {header} installed; pip install nvidia-cuda-runtime of torch's CUDA")
        found.append(places[0].parents[header.count("/")])
    return found


def refusal() -> str | None:
    """Why the null device cannot be built here; None: it can."""
    spec = importlib.util.find_spec("torch")
    lib = Path(str(spec.origin)).parent / "lib" if spec else Path()
    if not (lib / "libtorch_cuda.so").exists():
        return "this Python's torch is no CUDA build"
    missing = [tool for tool in ("gcc", "nm", "readelf") if not shutil.which(tool)]
    return f"{missing[0]} is not installed" if missing else None


def main(out: Path) -> None:
    if (why := refusal()) is not None:
        raise SystemExit(f"null device: {why}")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    torch_folder = Path(str(spec.origin)).parent
    packages = [Path(entry) for entry in sys.path if (Path(entry) / "nvidia").is_dir()]
    packages += [Path(entry) for entry in sys.path if (Path(entry) / "triton").is_dir()]
    out.mkdir(parents=True, exist_ok=True)
    write_stubs(torch_folder / "lib", out)
    flags = ["-shared", "-fPIC", "-O1", "-w", *(f"-I{folder}" for folder in header_folders(packages))]
    compile_ = ["gcc", *flags, "-Wl,-soname,libnull.so", "-o", out / "libnull.so"]
    subprocess.run([*compile_, HERE / "runtime.c", out / "rest.c", "-lpthread", "-ldl"], check=True)
    compile_ = ["gcc", *flags, "-Wl,-soname,libcuda.so.1", "-Wl,-rpath,$ORIGIN", "-o", out / "libcuda.so.1"]
    subprocess.run([*compile_, out / "driver.c", f"-L{out}", "-l:libnull.so"], check=True)
    for name in missing_libraries(torch_folder / "lib"):
        subprocess.run(["gcc", "-shared", f"-Wl,-soname,{name}", "-o", out / name, "-x", "c", os.devnull], check=True)
    print(f"built {out}/libnull.so and {out}/libcuda.so.1")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
