"""Loader tests.

Strategy: laws by property (the order is a permutation; ranks partition a global batch; resuming continues the stream),
contents against folders whose every token is known, faults one by one against their message.
Folders are written here, token by token, to the layout that data_prep documents; one test reads data_prep's own.
"""

import gc
import hashlib
import io
import json
import tarfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.files import fingerprint
from data_prep.settings import UserError
from pretrain.data import (
    BlockLoader,
    Blocks,
    ReadAhead,
    accumulation_steps,
    fixed_batches,
    number_documents,
    permute,
    read_verified,
    sample_order,
)
from pretrain.manifest import Manifest, index_path
from tests.benchmarks import bench_loader
from tests.helpers.corpus import prepare_tiny

EOS = 0


def sample(split: str, index: int, length: int) -> np.ndarray:
    """Tokens of sample `index`: its number first, then a ramp with an end-of-text in the middle."""
    tokens = (np.arange(length) + index) % 89 + 1
    tokens[0] = index + 100 + (5000 if split == "validation" else 0)
    tokens[length // 2] = EOS
    return tokens


def write_tar(path: Path, split: str, indices: range, length: int, dtype: str) -> None:
    """A tar of `{index:012d}.tokens.npy` members, and its index beside it."""
    offsets = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            content = io.BytesIO()
            np.save(content, sample(split, index, length).astype(dtype))
            member = tarfile.TarInfo(f"{index:012d}.tokens.npy")
            member.size = len(content.getvalue())
            offsets.append(tar.offset + 512 + member.size - length * np.dtype(dtype).itemsize)
            tar.addfile(member, io.BytesIO(content.getvalue()))
    np.save(index_path(path), np.array(offsets, dtype=np.int64))


def describe_shard(folder: Path, path: Path, samples: int, digest: str | None = None) -> dict:
    digest = digest or hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": str(path.relative_to(folder)), "samples": samples, "bytes": path.stat().st_size, "sha256": digest}


def write_manifest(folder: Path, shards: dict[str, list[dict]], **changes) -> dict:
    """A manifest of the given shards per split; `changes` replace its fields before it is sealed."""
    content = {
        "version": 1,
        "sequence_length": 8,
        "token_dtype": "uint16",
        "vocab_size": 10_000,
        "eos_token_id": EOS,
        "tokenizer_fingerprint": hashlib.sha256(b"{}").hexdigest(),
        "source": {},
        "corpus": "ramps",
        "licence": "none",
        "seed": 0,
        "documents": {"train": 1, "validation": 1},
        "unigram_loss": 5.0,
        "tools": {},
    } | changes
    content["splits"] = {}
    for split, described in shards.items():
        samples = sum(shard["samples"] for shard in described)
        tokens = samples * (content["sequence_length"] + 1)
        content["splits"][split] = {"samples": samples, "tokens": tokens, "shards": described}
    content["fingerprint"] = fingerprint(content)
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "manifest.json").write_text(json.dumps(content))
    return content


def write_folder(
    folder: Path, train=(5, 7), validation=(6, 5), length: int = 9, dtype: str = "uint16", **changes
) -> Path:
    """A prepared folder with shards of the given numbers of samples."""
    shards: dict[str, list[dict]] = {}
    for split, sizes in (("train", train), ("validation", validation)):
        (folder / split).mkdir(parents=True)
        shards[split], first = [], 0
        for number, size in enumerate(sizes):
            path = folder / split / f"shard-{number:06d}.tar"
            write_tar(path, split, range(first, first + size), length, dtype)
            shards[split].append(describe_shard(folder, path, size))
            first += size
    write_manifest(folder, shards, **{"sequence_length": length - 1, "token_dtype": dtype} | changes)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("prepared") / "ramps")


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Manifest:
    return read_verified(folder)


def indices_of(batch: list) -> list[int]:
    """Sample numbers in a list of micro-batches."""
    return [int(token) - 100 for micro in batch for token in micro.input_ids[:, 0]]


class TestOrder:
    @given(size=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
    @settings(deadline=None, max_examples=60)
    def test_every_epoch_visits_every_sample_once(self, size, seed, epoch):
        order = sample_order(np.arange(epoch * size, (epoch + 1) * size), size, seed)
        assert sorted(order.tolist()) == list(range(size))

    @given(size=st.integers(1, 2**40), data=st.data())
    @settings(deadline=None, max_examples=60)
    def test_large_domains_stay_in_range_and_apart(self, size, data):
        places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
        order = sample_order(np.array(places), size, 7)
        assert ((order >= 0) & (order < size)).all()
        assert len(set(order.tolist())) == len(places)

    def test_is_a_function_of_the_position_alone(self):
        whole = sample_order(np.arange(5000), 700, 3)
        for start in (0, 699, 1234, 4990):
            assert sample_order(np.arange(start, start + 10), 700, 3).tolist() == whole[start : start + 10].tolist()

    def test_never_changes_between_versions(self):
        """Golden values: another order would silently repeat and skip samples of every run that is resumed."""
        assert sample_order(np.arange(8), 8, 0).tolist() == [6, 5, 3, 0, 4, 2, 1, 7]
        assert sample_order(np.array([0, 1_000_000, 7 * 10**9 + 1]), 10**9, 1234).tolist() == [
            261025332,
            3300699,
            319617777,
        ]

    @pytest.mark.parametrize("size", [16, 100])
    def test_is_uniform_over_epochs(self, size):
        """Where the first place of an epoch goes: chi-square over 40 epochs per cell, bound at six sigma."""
        epochs = 40 * size
        first = sample_order(np.arange(epochs) * size, size, 5)
        counts = np.bincount(first, minlength=size)
        statistic = ((counts - 40) ** 2 / 40).sum()
        assert abs(statistic - (size - 1)) < 6 * (2 * (size - 1)) ** 0.5

    def test_neighbours_are_independent(self):
        """Correlation of an epoch's order with the stored order, with itself shifted and with the next epoch."""
        size = 20_000
        one, two = (sample_order(np.arange(e * size, (e + 1) * size), size, 11) for e in (0, 1))
        for a, b in ((one, np.arange(size)), (one[1:], one[:-1]), (one, two)):
            assert abs(np.corrcoef(a, b)[0, 1]) < 5 / size**0.5

    def test_keys_matter(self):
        keys = np.arange(6, dtype=np.uint64)
        places = np.arange(1000)
        assert (permute(places, 1000, keys) != permute(places, 1000, keys + np.uint64(1))).mean() > 0.95


class TestBlocks:
    @pytest.mark.parametrize("dtype", ["uint16", "uint32"])
    def test_holds_every_token(self, tmp_path, dtype):
        manifest = read_verified(write_folder(tmp_path / "x", dtype=dtype, length=10))
        for split in ("train", "validation"):
            blocks = Blocks(manifest, split)
            for index in range(len(blocks)):
                assert blocks[index].tolist() == sample(split, index, 10).tolist()
                assert blocks[index].dtype == dtype

    def test_gives_views_of_the_mapped_file(self, manifest):
        blocks = Blocks(manifest, "train")
        block = blocks[3]
        assert not block.flags.owndata and not block.flags.writeable
        assert np.shares_memory(block, blocks[3])

    def test_gather_keeps_the_given_order(self, manifest):
        rows = Blocks(manifest, "train").gather([11, 0, 4, 5])
        assert rows.dtype == torch.int64
        assert rows.tolist() == [sample("train", i, 9).tolist() for i in (11, 0, 4, 5)]

    def test_keeps_no_file_open(self, manifest):
        descriptors = Path("/proc/self/fd")
        before = len(list(descriptors.iterdir()))
        blocks = Blocks(manifest, "train")
        blocks.gather(range(12))
        assert len(list(descriptors.iterdir())) == before

    @pytest.mark.parametrize("index", [-1, 12])
    def test_refuses_an_index_outside(self, manifest, index):
        with pytest.raises(IndexError):
            Blocks(manifest, "train")[index]


class TestDocuments:
    def test_eos_belongs_to_the_document_that_it_ends(self):
        tokens = torch.tensor([[5, 0, 7, 7, 0, 0, 3], [0, 1, 1, 1, 1, 1, 0]])
        assert number_documents(tokens, 0).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]

    def test_loader_shifts_by_one_and_numbers(self, manifest):
        micro = next(BlockLoader(manifest, "train", 4, 4))[0]
        (rows,) = (Blocks(manifest, "train").gather(indices_of([micro])),)
        assert micro.input_ids.tolist() == rows[:, :-1].tolist()
        assert micro.targets.tolist() == rows[:, 1:].tolist()
        assert micro.document_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]] * 4
        assert micro.samples == 4

    def test_masking_off_gives_no_documents(self, manifest):
        assert next(BlockLoader(manifest, "train", 4, 4, document_masking=False))[0].document_ids is None
        (micro,) = next(BlockLoader(manifest, "train", 4, 4))
        assert micro.num_documents == sum(len(set(row)) for row in micro.document_ids.tolist())


class TestLoader:
    @given(micro=st.integers(1, 3), world=st.integers(1, 4), steps=st.integers(1, 3), position=st.integers(0, 50))
    @settings(deadline=None, max_examples=25)
    def test_ranks_partition_each_global_batch(self, manifest, micro, world, steps, position):
        size = micro * world * steps
        loaders = [BlockLoader(manifest, "train", size, micro, r, world, position=position) for r in range(world)]
        for batch in range(2):
            per_rank = [next(loader) for loader in loaders]
            assert all(len(part) == steps for part in per_rank)
            start = position + batch * size
            expected = sample_order(np.arange(start, start + size), 12, 0).tolist()
            by_step = [indices_of([part[step]]) for step in range(steps) for part in per_rank]
            assert [index for part in by_step for index in part] == expected
        for loader in loaders:
            loader.close()

    @pytest.mark.parametrize("workers", [1, 3])
    @pytest.mark.parametrize("read_ahead_batches", [1, 5])
    def test_order_does_not_depend_on_workers(self, manifest, workers, read_ahead_batches):
        loader = BlockLoader(manifest, "train", 4, 2, seed=9, workers=workers, read_ahead_batches=read_ahead_batches)
        seen = [index for _ in range(9) for index in indices_of(next(loader))]
        assert seen == sample_order(np.arange(36), 12, 9).tolist()
        assert loader.position == 36 and loader.epoch == 3

    @given(before=st.integers(0, 7), size=st.sampled_from([1, 2, 4, 12]), again=st.sampled_from([1, 3, 6]))
    @settings(deadline=None, max_examples=20)
    def test_resume_continues_at_any_batch_size(self, manifest, before, size, again):
        loader = BlockLoader(manifest, "train", size, 1)
        for _ in range(before):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        loader.close()
        resumed = BlockLoader(manifest, "train", again, 1)
        resumed.load_state(state)
        position = before * size
        assert resumed.position == position
        assert indices_of(next(resumed)) == sample_order(np.arange(position, position + again), 12, 0).tolist()
        resumed.close()

    def test_position_counts_what_was_handed_out_not_what_was_read_ahead(self, manifest):
        loader = BlockLoader(manifest, "train", 6, 2)
        assert loader.state()["position"] == 0
        next(loader)
        assert loader.state()["position"] == 6

    def test_load_state_takes_effect_while_running(self, manifest):
        loader = BlockLoader(manifest, "train", 3, 3)
        first, state = next(loader), loader.state()
        second = next(loader)
        loader.load_state(state)
        assert indices_of(next(loader)) == indices_of(second) != indices_of(first)

    def test_changed_data_is_refused_by_name(self, manifest, tmp_path):
        other = Manifest.read(write_folder(tmp_path / "other", train=(5, 8)))
        state = BlockLoader(manifest, "train", 4, 4).state()
        with pytest.raises(UserError) as error:
            BlockLoader(other, "train", 4, 4).load_state(state)
        for part in (str(other.folder), manifest.fingerprint, other.fingerprint):
            assert part in str(error.value)

    def test_changed_seed_is_refused(self, manifest):
        with pytest.raises(UserError, match=r"seed 1 .* seed 0"):
            BlockLoader(manifest, "train", 4, 4, seed=1).load_state(BlockLoader(manifest, "train", 4, 4).state())

    @pytest.mark.parametrize("wrong", [{"rank": 2, "world_size": 2}, {"seed": -1}, {"position": -1}, {"workers": 0}])
    def test_impossible_arguments_are_named(self, manifest, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BlockLoader(manifest, "train", 4, 1, **wrong)

    def test_empty_split_is_refused(self, tmp_path):
        manifest = Manifest.read(write_folder(tmp_path / "x", validation=()))
        with pytest.raises(UserError, match="'validation' holds no sample"):
            BlockLoader(manifest, "validation", 1, 1)

    def test_micro_batches_move(self, manifest):
        micro = next(BlockLoader(manifest, "train", 2, 2))[0].to("meta")
        assert {x.device.type for x in (micro.input_ids, micro.targets, micro.document_ids)} == {"meta"}
        assert micro.samples == 2


class TestSizes:
    @pytest.mark.parametrize(("batch", "micro", "world", "steps"), [(8, 8, 1, 1), (8, 2, 2, 2), (96, 8, 3, 4)])
    def test_steps(self, batch, micro, world, steps):
        assert accumulation_steps(batch, micro, world) == steps

    @pytest.mark.parametrize(
        ("batch", "micro", "world", "works"),
        [(100, 8, 3, "24 or 96 or 120"), (5, 8, 1, "8"), (9, 4, 2, "8 or 16"), (0, 4, 1, "4")],
    )
    def test_what_does_not_divide_is_refused_with_a_value_that_works(self, batch, micro, world, works):
        with pytest.raises(UserError) as error:
            accumulation_steps(batch, micro, world)
        message = str(error.value)
        assert f"batch.size {batch} " in message and f" {micro} sequences on {world} ranks" in message
        assert message.endswith(f"set batch.size to {works}")
        for value in works.split(" or "):
            assert accumulation_steps(int(value), micro, world) >= 1


class TestReadAhead:
    def test_reads_no_further_than_its_depth(self):
        started: list[int] = []
        results = ReadAhead(lambda x: started.append(x) or x, iter(range(100)), depth=3, workers=1)
        assert [next(results), next(results)] == [0, 1]
        results.close()
        assert set(started) <= set(range(5)) and {0, 1} <= set(started)

    @pytest.mark.timeout(60)
    def test_one_that_is_dropped_is_waited_for_by_nobody(self):
        """The collector may find it where the locks of `threading` are held, and to join a thread takes them."""
        results = ReadAhead(lambda x: x, range(100), depth=3, workers=1)
        assert next(results) == 0
        (worker,) = results._executor._threads
        results.itself = results  # a cycle, which the collector alone ends
        del results
        with getattr(threading, "_shutdown_locks_lock", nullcontext()):  # Python 3.13 has none
            gc.collect()
        worker.join(30)
        assert not worker.is_alive()

    def test_keeps_order_when_later_work_is_faster(self):
        def load(x: int) -> int:
            time.sleep(0.01 if x % 2 == 0 else 0)
            return x

        assert list(ReadAhead(load, range(12), depth=4, workers=3)) == list(range(12))

    def test_threads_end_with_the_loader(self, manifest):
        gc.collect()
        before = threading.active_count()
        loader = BlockLoader(manifest, "train", 4, 4, workers=2)
        next(loader)
        assert threading.active_count() > before
        loader.close()
        assert threading.active_count() == before

    def test_an_exception_arrives_in_place_and_again(self, manifest, monkeypatch):
        loader = BlockLoader(manifest, "train", 4, 4)
        load = loader.load

        def fail_at_8(position: int) -> list:
            if position == 8:
                raise OSError("disk is gone")
            return load(position)

        monkeypatch.setattr(loader, "load", fail_at_8)
        next(loader), next(loader)
        for _ in range(2):
            with pytest.raises(OSError, match="disk is gone"):
                next(loader)
            assert loader.position == 8
        monkeypatch.undo()
        assert indices_of(next(loader)) == sample_order(np.arange(8, 12), 12, 0).tolist()


class TestFixedBatches:
    @given(micro=st.integers(1, 5), world=st.integers(1, 4), limit=st.none() | st.integers(1, 20))
    @settings(deadline=None, max_examples=30)
    def test_every_sample_once_over_all_ranks_and_equal_steps(self, manifest, micro, world, limit):
        per_rank = [
            list(fixed_batches(manifest, "validation", micro, rank, world, samples=limit)) for rank in range(world)
        ]
        assert len({len(batches) for batches in per_rank}) == 1
        seen = []
        for batch in (batch for batches in per_rank for batch in batches):
            assert batch.input_ids.shape == (micro, 8)
            assert (batch.targets[batch.samples :] == -100).all() and (batch.targets[: batch.samples] >= 0).all()
            seen += indices_of([batch])[: batch.samples]
        assert sorted(seen) == [5000 + i for i in range(min(limit or 11, 11))]

    def test_order_is_the_stored_one(self, manifest):
        seen = [i for batch in fixed_batches(manifest, "validation", 4) for i in indices_of([batch])[: batch.samples]]
        assert seen == [5000 + i for i in range(11)]


class TestManifest:
    """One message for each fault: it names the file and says what to do."""

    @pytest.fixture
    def copy(self, tmp_path) -> Path:
        return write_folder(tmp_path / "copy")

    def refused(self, folder: Path, *parts: str, verify: bool = False) -> None:
        with pytest.raises(UserError) as error:
            read_verified(folder) if verify else Manifest.read(folder)
        for part in parts:
            assert part in str(error.value), str(error.value)

    def rewrite(self, folder: Path, change: Callable[[dict], object]) -> None:
        """Change a manifest and seal it again."""
        content = json.loads((folder / "manifest.json").read_text())
        del content["fingerprint"]
        change(content)
        (folder / "manifest.json").write_text(json.dumps({**content, "fingerprint": fingerprint(content)}))

    def test_reads(self, copy):
        manifest = read_verified(copy)
        assert (manifest.split("train").samples, manifest.split("validation").samples) == (12, 11)
        assert manifest.folder == copy and manifest.sequence_length == 8

    def test_missing_folder_names_the_command(self, tmp_path):
        self.refused(tmp_path / "none", "no such folder", "data_prep/prepare.py", f"folder={tmp_path / 'none'}")

    def test_unfinished_folder(self, copy):
        (copy / "manifest.json").unlink()
        self.refused(copy, str(copy), "not finished", "data_prep/prepare.py")

    def test_half_a_manifest(self, copy):
        path = copy / "manifest.json"
        path.write_text(path.read_text()[:100])
        self.refused(copy, str(path), "not a manifest")

    def test_other_version(self, copy):
        write_manifest(copy, {}, version=2)
        self.refused(copy, "manifest.json", "version 2")

    def test_edited_manifest(self, copy):
        path = copy / "manifest.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
        self.refused(copy, str(path), "altered")

    def test_missing_field_is_named(self, copy):
        self.rewrite(copy, lambda content: content.pop("eos_token_id"))
        self.refused(copy, "manifest.json", "eos_token_id")

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_truncated_shard(self, copy, split):
        path = copy / split / "shard-000001.tar"
        path.write_bytes(path.read_bytes()[:-512])
        self.refused(copy, str(path), "truncated")

    def test_missing_shard(self, copy):
        path = copy / "train" / "shard-000000.tar"
        path.unlink()
        self.refused(copy, str(path), "missing")

    def test_missing_index(self, copy):
        path = copy / "train" / "shard-000001.idx.npy"
        path.unlink()
        self.refused(copy, str(path), "missing")

    @pytest.mark.parametrize("verify", [False, True])
    def test_missing_tokenizer(self, copy, verify):
        (copy / "tokenizer.json").unlink()
        self.refused(copy, str(copy / "tokenizer.json"), "missing", verify=verify)

    def test_altered_tokenizer(self, copy):
        (copy / "tokenizer.json").write_bytes(b"{ }")
        self.refused(copy, str(copy / "tokenizer.json"), "altered", verify=True)

    def test_sample_counts_that_do_not_add_up(self, copy):
        self.rewrite(copy, lambda content: content["splits"]["train"].update(samples=13))
        self.refused(copy, "'train' does not add up")

    @given(data=st.data())
    @settings(deadline=None, max_examples=15)
    def test_one_flipped_byte_is_caught_by_name(self, tmp_path_factory, data):
        folder = write_folder(tmp_path_factory.mktemp("flipped") / "x", train=(2,), validation=(2,))
        path = folder / data.draw(st.sampled_from(["train", "validation"])) / "shard-000000.tar"
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        self.refused(folder, str(path), "sha256", verify=True)

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x[:-1],
            lambda x: x[::-1],
            lambda x: x + 4096,
            lambda x: x - 4096,
            lambda x: x.astype(np.int32),
            lambda x: x + 1,
            lambda x: x + 2,
        ],
        ids=["short", "reversed", "past the end", "before the start", "dtype", "odd", "shifted"],
    )
    def test_altered_index(self, copy, change):
        path = copy / "train" / "shard-000001.idx.npy"
        np.save(path, change(np.load(path)))
        self.refused(copy, path.name, "index", verify=True)

    def test_index_that_is_no_array(self, copy):
        path = copy / "train" / "shard-000000.idx.npy"
        path.write_bytes(path.read_bytes()[:130])
        with pytest.raises(UserError, match=r"shard-000000\.idx\.npy: cannot be read as an index"):
            next(BlockLoader(Manifest.read(copy), "train", 12, 12))

    def test_token_outside_the_vocabulary_names_the_shard(self, tmp_path):
        manifest = Manifest.read(write_folder(tmp_path / "x", vocab_size=107))
        with pytest.raises(UserError, match=r"shard-000001\.tar: shard is altered: sample 7 holds token 107"):
            Blocks(manifest, "train").gather([0, 6, 7, 8])

    def test_vocabulary_larger_than_the_models(self, manifest):
        manifest.check_model(10_000, 8)
        with pytest.raises(UserError, match=r"vocabulary of 10000 .* model's 4096"):
            manifest.check_model(4096, 8)

    def test_other_sequence_length(self, manifest):
        with pytest.raises(UserError, match=r"sequences of 8 .* asks for 16"):
            manifest.check_model(10_000, 16)

    def test_other_tokenizer(self, copy):
        state = BlockLoader(Manifest.read(copy), "train", 4, 4).state()
        self.rewrite(copy, lambda content: content.update(tokenizer_fingerprint="u" * 64))
        with pytest.raises(UserError, match=r"copy: prepared with tokenizer uuu.* the checkpoint uses tokenizer 44136"):
            BlockLoader(Manifest.read(copy), "train", 4, 4).load_state(state)


def test_reads_what_data_prep_writes(tmp_path):
    """Every block of a real preparation, over several shards, as plain tar readers see it."""
    prepare_tiny(tmp_path / "tiny", shard_bytes=30_000)
    manifest = read_verified(tmp_path / "tiny")
    assert len(manifest.split("train").shards) > 1
    for split in ("train", "validation"):
        stored = []
        for shard in manifest.split(split).shards:
            with tarfile.open(manifest.folder / shard.name) as tar:
                arrays = [np.load(io.BytesIO(tar.extractfile(member).read())) for member in tar]
                stored += np.concatenate(arrays).tolist()
        batches = list(fixed_batches(manifest, split, 8))
        inputs = torch.cat([batch.input_ids[: batch.samples] for batch in batches])
        targets = torch.cat([batch.targets[: batch.samples] for batch in batches])
        assert torch.cat([inputs, targets[:, -1:]], dim=1).tolist() == stored
        documents = torch.cat([batch.document_ids[: batch.samples] for batch in batches])
        assert (documents[:, 1:] - documents[:, :-1] == (inputs[:, :-1] == manifest.eos_token_id)).all()
        assert documents.max() > 0


def write_large_folder(folder: Path, shards: int, samples: int) -> Path:
    """A folder of sparse shards: full size by their names and indexes, no tokens but zeros on the disk."""
    described = []
    stride = 1024
    (folder / "train").mkdir(parents=True)
    for number in range(shards):
        path = folder / "train" / f"shard-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(samples * stride + 10240)
        np.save(index_path(path), np.arange(samples, dtype=np.int64) * stride + 640)
        described.append(describe_shard(folder, path, samples, digest="0" * 64))
    write_manifest(folder, {"train": described})
    return folder


def test_resume_at_position_one_million_starts_within_a_second(tmp_path):
    """Opening folder, indexes and shards included; the best of three, in three epochs, as machines are shared."""
    folder = write_large_folder(tmp_path / "large", shards=8, samples=250_000)
    state = BlockLoader(Manifest.read(folder), "train", 16, 8).state()
    seconds = []
    for epoch in (0, 7, 1000):
        position = epoch * 2_000_000 + 1_000_000
        started = time.perf_counter()
        loader = BlockLoader(Manifest.read(folder), "train", 16, 8)
        loader.load_state(state | {"position": position})
        batch = next(loader)
        seconds.append(time.perf_counter() - started)
        assert len(batch) == 2 and (loader.position, loader.epoch) == (position + 16, epoch)
        loader.close()
    assert min(seconds) < 1


def test_hands_out_ten_times_what_the_trainer_consumes(tmp_path):
    """The benchmark's own measure at its least favourable sequence length; about a hundred times in practice."""
    manifest = Manifest.read(bench_loader.write_random_folder(tmp_path / "random", 256, 1_000_000))
    assert bench_loader.measure(manifest, seconds=0.5) > bench_loader.GOAL * bench_loader.CONSUMED
