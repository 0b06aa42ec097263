"""Tensors of a live model, compared byte for byte with saving it and exporting what was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32 import (
    CheckpointError,
    Fp32Config,
    export_checkpoint,
    install_optimizer_repairs,
    model_provider,
    named_scheme,
    verify_checkpoints,
)
from megatron_fp32.checkpoint.formats.digests import digest
from megatron_fp32.models.live import LiveTensors
from megatron_fp32.models.provider import cpu_overrides
from megatron_fp32.streaming import HuggingFaceDirectory, StreamError, Upload, WeightStreamer
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import Batch, Trainer, TrainerConfig
from tests.checkpoint.layouts import Layout, build, load, on_ranks, save
from tests.checkpoint.support import stored_tensors
from tests.checkpoint.test_parallel_loads import EP2, LOADS, PP2, TP4, _for_four, _for_two, _id
from tests.conftest import Families
from tests.families import Case, case
from tests.streaming.live_models import Kept, expected, live, push

Ranks = Callable[[int], RankPool]

SOME = [
    (TP4, _for_four("Qwen3.5", groups=2)),
    (PP2, case("Qwen3.5, tied")),
    (EP2, _for_two("Qwen3.5-MoE")),
    (Layout(tensor=2, expert=2), _for_two("Qwen3-Next")),
]


@pytest.mark.parametrize(("layout", "case"), LOADS, ids=_id)
def test_an_untrained_model_gives_the_bytes_of_its_source(
    ranks: Ranks,
    families: Families,
    layout: Layout,
    case: Case,
) -> None:
    hf, imported = families(case)
    *others, sent = ranks(layout.ranks).run(on_ranks, layout, push, hf, imported, None, mtp=case.mtp)
    assert not any(others)
    converted = {n: e for n, e in expected(hf).items() if case.mtp or not n.startswith("mtp.")}
    assert sent == converted


@pytest.mark.parametrize("fp8", [None, "channelwise"])
def test_experts_that_are_stored_transposed_are_sent_as_separate_experts_are_stored(
    ranks: Ranks, families: Families, fp8: str | None
) -> None:
    hf, imported = families(case("Qwen3-VL-MoE, as released"))
    _, sent = ranks(2).run(on_ranks, Layout(tensor=2), push, hf, imported, None, mtp=False, fp8=fp8)
    text = {n: e for n, e in expected(hf, transposed=True).items() if not n.startswith("model.visual.")}
    if fp8 is None:
        assert sent == text
    else:
        assert {n: e[1] for n, e in sent.items() if n in text} == {n: e[1] for n, e in text.items()}


@pytest.mark.parametrize(("layout", "case"), SOME, ids=_id)
def test_a_trained_model_gives_what_save_and_export_give(
    ranks: Ranks,
    families: Families,
    tmp_path: Path,
    layout: Layout,
    case: Case,
) -> None:
    hf, imported = families(case)
    saved = tmp_path / "saved"
    *_, sent = ranks(layout.ranks).run(on_ranks, layout, push, hf, imported, saved, mtp=case.mtp)
    export_checkpoint(saved, tmp_path / "exported", source=imported)
    assert sent == expected(tmp_path / "exported")
    assert sent != expected(hf)
    assert not verify_checkpoints(hf, tmp_path / "exported").agrees()


@pytest.mark.parametrize("fp8", ["blockwise", "channelwise", "modelopt"])
def test_float8_is_what_export_quantizes(
    ranks: Ranks,
    families: Families,
    tmp_path: Path,
    fp8: str,
) -> None:
    layout, made = SOME[2]
    hf, imported = families(made)
    saved = tmp_path / "saved"
    *_, sent = ranks(layout.ranks).run(on_ranks, layout, push, hf, imported, saved, mtp=made.mtp, fp8=fp8)
    export_checkpoint(saved, tmp_path / "exported", source=imported, fp8=named_scheme(fp8))
    assert sent == expected(tmp_path / "exported")
    assert any(dtype == "torch.float8_e4m3fn" for dtype, _, _ in sent.values())


def to_directory(hf: Path, imported: Path, out: Path, saved: Path, *, layout: Layout) -> None:
    chunks = live(hf, imported, layout, mtp=False, train=True)
    save(chunks, saved)
    dist.barrier()
    WeightStreamer(chunks, source=imported).push(HuggingFaceDirectory(out), version=1)


def test_a_directory_equals_an_export(ranks: Ranks, families: Families, tmp_path: Path) -> None:
    hf, imported = families(case("Qwen3-MoE"))
    ranks(2).run(on_ranks, Layout(tensor=2), to_directory, hf, imported, tmp_path / "sent", tmp_path / "saved")
    export_checkpoint(tmp_path / "saved", tmp_path / "exported", source=imported)
    assert stored_tensors(tmp_path / "sent") == stored_tensors(tmp_path / "exported")
    others = {p.name for p in (tmp_path / "exported").iterdir() if not p.name.endswith(".safetensors")}
    assert {p.name for p in (tmp_path / "sent").iterdir() if not p.name.endswith(".safetensors")} == others
    for name in others - {"model.safetensors.index.json"}:
        assert (tmp_path / "sent" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "saved", "sent"]


class Fails(Kept):
    def __init__(self, moment: str) -> None:
        super().__init__()
        self._moment = moment

    def begin(self, upload: Upload) -> None:
        if self._moment == "begin":
            raise OSError("no engine there")
        super().begin(upload)

    def write(self, name: str, tensor: Tensor) -> None:
        super().write(name, tensor)
        if self._moment == "write" and len(self.tensors) == 3:
            raise OSError("the engine has gone")

    def finish(self) -> None:
        if self._moment in ("finish", "abort"):
            raise OSError("the engine says no")
        super().finish()

    def abort(self, error: BaseException) -> None:
        super().abort(error)
        if self._moment == "abort":
            raise ConnectionError("the engine cannot be told")


def failing(hf: Path, imported: Path, *, layout: Layout) -> list[str]:
    """A push fails at every moment, and the next one works, on all ranks."""
    streamer = WeightStreamer(live(hf, imported, layout, mtp=True, train=False), source=imported)
    messages = []
    for moment in ("begin", "write", "finish", "abort"):
        sink = Fails(moment)
        expects = OSError if streamer.is_sender else StreamError
        with pytest.raises(expects, match="engine") as caught:
            streamer.push(sink, version=1)
        messages.append(str(caught.value))
        if moment == "abort" and streamer.is_sender:
            assert "ConnectionError: the engine cannot be told" in caught.value.__notes__[0]
        assert [call.split()[0] for call in sink.calls[-1:]] == (["abort"] if streamer.is_sender else [])
    after = Kept()
    streamer.push(after, version=2)
    assert after.calls == (["begin 2", "finish"] if streamer.is_sender else [])
    names = []
    for name, _ in streamer:
        names.append(name)
        if len(names) == 2:
            break
    whole = [name for name, _ in streamer]
    assert whole == list(after.tensors)
    return messages


def test_a_push_that_fails_ends_on_every_rank_and_the_next_one_works(
    ranks: Ranks,
    families: Families,
) -> None:
    hf, imported = families(case("Qwen3.5"))
    sender, other = ranks(2).run(on_ranks, Layout(tensor=2), failing, hf, imported)
    assert sender == ["no engine there", "the engine has gone", "the engine says no", "the engine says no"]
    assert other == [f"rank 0, which sends, failed: OSError: {message}" for message in sender]


def not_finite(hf: Path, imported: Path, *, layout: Layout) -> str:
    chunks = live(hf, imported, layout, mtp=False, train=False)
    with torch.no_grad():
        chunks[0].decoder.layers[0].mlp.linear_fc2.weight[0, 0] = torch.inf
    streamer = WeightStreamer(chunks, source=imported, fp8="channelwise")
    sink = Kept()
    with pytest.raises(ValueError if streamer.is_sender else StreamError) as caught:
        streamer.push(sink, version=1)
    assert "finish" not in sink.calls
    return str(caught.value)


def test_a_weight_that_cannot_be_quantized_ends_the_push(ranks: Ranks, families: Families) -> None:
    hf, imported = families(case("Qwen3"))
    for message in ranks(2).run(on_ranks, Layout(tensor=2), not_finite, hf, imported):
        assert "layers.0.mlp.down_proj.weight" in message


def interrupted(hf: Path, imported: Path, *, layout: Layout) -> None:
    """The sending rank runs out of memory in the middle of a tensor; the next push has every byte."""
    streamer = WeightStreamer(live(hf, imported, layout, mtp=True, train=False), source=imported)
    whole = Kept()
    streamer.push(whole, version=1)
    for calls in (1, 5, 12):
        with pytest.MonkeyPatch.context() as patch:
            empty, left = LiveTensors._empty, [calls]

            def exhausted(self: Any, name: str, index: Any, left: list[int] = left, empty: Any = empty) -> Tensor:
                left[0] -= 1
                if left[0] == 0:
                    raise MemoryError("no room for a tensor")
                return empty(self, name, index)

            patch.setattr(LiveTensors, "_empty", exhausted)
            with pytest.raises(MemoryError if streamer.is_sender else StreamError, match="no room for a tensor"):
                streamer.push(Kept(), version=2)
    again = Kept()
    streamer.push(again, version=3)
    assert again.tensors == whole.tensors


def test_a_sender_without_memory_leaves_no_shard_over(ranks: Ranks, families: Families) -> None:
    hf, imported = families(case("Qwen3.5"))
    ranks(2).run(on_ranks, Layout(tensor=2), interrupted, hf, imported)


def on_one_rank_alone(hf: Path, imported: Path, *, layout: Layout) -> list[str]:
    """What only one rank finds out is raised on both."""
    chunks = live(hf, imported, layout, mtp=True, train=False)
    second = dist.get_rank() == 1
    with pytest.raises(CheckpointError if second else StreamError) as no_source:
        WeightStreamer(chunks, source=imported / "elsewhere" if second else imported)
    streamer = WeightStreamer(chunks, source=imported)
    if second:
        sharded = chunks[0].decoder.layers[0].mlp.linear_fc2.weight
        sharded.data = sharded.data.double()
    with pytest.raises(ValueError if second else StreamError) as changed:
        streamer.push(Kept(), version=1)
    return [str(no_source.value), str(changed.value)]


def test_what_one_rank_alone_finds_wrong_is_raised_on_all(ranks: Ranks, families: Families) -> None:
    hf, imported = families(case("Qwen3.5"))
    first, second = ranks(2).run(on_ranks, Layout(tensor=2), on_one_rank_alone, hf, imported)
    assert first[0] == f"rank 1 failed: CheckpointError: {second[0]}"
    assert first[1] == f"rank 1 failed: ValueError: {second[1]}"
    assert "have changed since LiveTensors was made" in second[1]


def from_a_replica(hf: Path, imported: Path, *, layout: Layout) -> Any:
    """The second data-parallel rank gives no piece and sends; iteration tells the other rank of an error."""
    chunks = live(hf, imported, layout, mtp=False, train=False)
    streamer = WeightStreamer(chunks, source=imported, fp8="channelwise", sender=1)
    sent = {name: digest(tensor) for name, tensor in streamer}
    with torch.no_grad():
        chunks[0].decoder.layers[0].mlp.linear_fc2.weight[0, 0] = torch.inf
    with pytest.raises(ValueError if streamer.is_sender else StreamError, match=r"down_proj\.weight"):
        for _ in streamer:
            pass
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    if streamer.is_sender:
        with pytest.raises(ValueError, match="held by no rank of the group"):
            LiveTensors(chunks, group=alone)
    return sent


def test_a_replica_can_send(ranks: Ranks, families: Families) -> None:
    hf, imported = families(case("Qwen3"))
    nothing, sent = ranks(2).run(on_ranks, Layout(), from_a_replica, hf, imported)
    assert nothing == {}
    assert set(expected(hf)) <= set(sent)


@pytest.mark.usefixtures("megatron")
class TestOneProcess:
    def test_what_is_refused(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3"))
        _, other = families(case("Llama"))
        chunks = build(hf)
        with pytest.raises(CheckpointError, match="this is not the model that was imported"):
            WeightStreamer(chunks, source=other)
        with pytest.raises(CheckpointError):
            WeightStreamer(chunks, source=tmp_path / "nowhere")
        with pytest.raises(ValueError, match="unknown float8 scheme 'fp8'"):
            WeightStreamer(chunks, source=imported, fp8="fp8")
        with pytest.raises(ValueError, match="sender must be a rank of the group of 1 ranks, got 1"):
            WeightStreamer(chunks, source=imported, sender=1)
        streamer = WeightStreamer(chunks, source=imported)
        with pytest.raises(TypeError, match="version must be an int"):
            streamer.push(Kept(), version="1")  # type: ignore[arg-type]

    def test_a_model_that_was_rounded_is_refused(self, families: Families) -> None:
        hf, imported = families(case("Qwen3.5"))
        chunks = build(hf, mtp=True)
        load(chunks, imported)
        streamer = WeightStreamer(chunks, source=imported)
        assert dict(streamer)["model.layers.0.linear_attn.A_log"].dtype == torch.float32
        chunks[0].decoder.layers[0].self_attention.A_log.data = (
            chunks[0].decoder.layers[0].self_attention.A_log.data.bfloat16()
        )
        with pytest.raises(ValueError, match="tensors, shapes or dtypes of the model have changed"):
            list(streamer)
        with pytest.raises(CheckpointError, match=r"fewer bits of these tensors .*A_log\. Pass allow_rounded=True"):
            list(WeightStreamer(chunks, source=imported))

    def test_an_existing_directory_is_not_touched(self, families: Families, tmp_path: Path) -> None:
        hf, imported = families(case("Qwen3"))
        chunks = build(hf)
        load(chunks, imported)
        streamer = WeightStreamer(chunks, source=imported)
        out = tmp_path / "out"
        out.mkdir()
        with pytest.raises(CheckpointError, match="exists"):
            streamer.push(HuggingFaceDirectory(out), version=1)
        assert list(out.iterdir()) == []
        out.rmdir()
        streamer.push(HuggingFaceDirectory(out), version=1)
        assert stored_tensors(out) == stored_tensors(hf)


def after_a_step(hf: Path, imported: Path, *, layout: Layout, overlap: bool) -> tuple[dict[str, Any], list[str]]:
    """What is streamed after a step of the distributed optimizer, and the parameters that were old on this rank."""
    with install_optimizer_repairs():
        torch.manual_seed(3)
        provide = model_provider(hf, bf16=True, fp32=Fp32Config(), **cpu_overrides())
        trainer = Trainer(
            provide(), TrainerConfig(lr=1e-2, overlap_grad_reduce=True, overlap_param_gather=overlap, bucket_size=3000)
        )
        trainer.load_model(imported / "release")
        trainer.step([Batch.random(57, batch=2, length=16, seed=dist.get_rank())])
        before = {name: digest(parameter.detach()) for name, parameter in trainer.model.named_parameters()}
        streamer = WeightStreamer(trainer.wrapped, source=imported)
        sink = Kept()
        streamer.push(sink, version=1)
        after = {name: digest(parameter.detach()) for name, parameter in trainer.model.named_parameters()}
        trainer.step([Batch.random(57, batch=2, length=16, seed=7)])  # training goes on
        return sink.tensors, [name for name in after if after[name] != before[name]]


def test_parameters_that_a_step_left_on_other_ranks_are_gathered_first(ranks: Ranks, families: Families) -> None:
    hf, imported = families(case("Qwen3, tied"))
    (expected_tensors, _), _ = ranks(2).run(on_ranks, Layout(), after_a_step, hf, imported, overlap=False)
    (sent, old_on_first), (_, old_on_second) = ranks(2).run(
        on_ranks, Layout(), after_a_step, hf, imported, overlap=True
    )
    assert old_on_first or old_on_second
    assert sent == expected_tensors
    assert sent != expected(hf)
