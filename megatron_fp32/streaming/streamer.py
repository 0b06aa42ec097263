"""From a live model to a sink: every rank takes part, one rank sends, and a push counts when everything has arrived."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megatron_fp32.checkpoint.fp8.detect import detect_scheme
from megatron_fp32.checkpoint.sidecar import Sidecar, find_sidecar
from megatron_fp32.errors import CheckpointError, listing
from megatron_fp32.models.live import LiveTensors, make_current
from megatron_fp32.streaming.ranks import Ranks, Reception
from megatron_fp32.streaming.several import SeveralSinks
from megatron_fp32.streaming.sinks import EngineReceipt, Sink, Upload
from megatron_fp32.streaming.units import Contents, contents, sent_tensors
from megatron_fp32.validation import check_choice, check_count, check_flag, check_path
from megatron_fp32.weights.choices import ExportDtype
from megatron_fp32.weights.fp8.scheme import Fp8Scheme, named_scheme
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.model_map import map_trained_model
from megatron_fp32.weights.restore import Dtypes, Restorer, decide_dtypes, must_be_read
from megatron_fp32.weights.tensors import TensorInfo

logger = logging.getLogger(__name__)

LIKE_ENGINE = "like:engine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a push did. Equal on all ranks but for the seconds."""

    version: int
    tensors: int
    """How many were sent."""
    nbytes: int
    widened: tuple[str, ...]
    """Trained in fp32 from a 16-bit source, and sent as F32."""
    seconds: float
    """Of this rank, from the call to the end."""
    gather_seconds: float
    """Of it, putting tensors together from their shards."""
    sink_seconds: float
    """Of it, in the sink. 0 on ranks that do not send."""
    engines: tuple[EngineReceipt, ...]
    """Of the engines that have the version."""
    failed: Mapping[str, str]
    """Sinks that do not have the version, and why. A push whose sinks all fail raises instead."""


class WeightStreamer:
    """The Hugging Face tensors of a live Megatron model, for any tensor, pipeline, expert and data parallel layout.

    Every rank makes it and calls its methods, because every rank sends its shards. No rank holds more than its own
    shards, one unit as it is put together, and what the unit becomes; the largest unit is the embedding.

    The tensors have the names, the order and the bytes that saving the model and `export` would give. Fused experts
    are sent one by one, under the names of separate experts.

    Args:
        model: the chunks of this rank, as DistributedDataParallel, Float16Module or nothing wraps them.
        source: directory that the import made, which knows names, dtypes and exact originals.
        fp8: quantize on the sending rank: a scheme, the name of a format, "like:engine" for the format of the engine's
            model, or "like:" and a directory for the format of that model.
        dtype: `"source"` rounds what was trained in fp32 from a 16-bit source; `"trained"` sends it as F32.
        allow_rounded: send tensors although the model holds fewer bits of them than the source did.
        group: all ranks that hold the model, replicas included; None for the default group, or for one process
            without torch.distributed.
        sender: rank in the group that puts the tensors together and sends them.

    Raises:
        CheckpointError: when `source` is not an import, or this is not the model that was imported.
        ValueError: for an argument with a value that is not allowed, Megatron-FSDP, or FP8 parameters.
        TypeError: for an argument of another type.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        *,
        source: str | Path,
        fp8: Fp8Scheme | str | None = None,
        dtype: ExportDtype = "trained",
        allow_rounded: bool = False,
        group: dist.ProcessGroup | None = None,
        sender: int = 0,
    ) -> None:
        check_path("source", source)
        check_choice("dtype", dtype, ("trained", "source"))
        check_flag("allow_rounded", allow_rounded)
        check_count("sender", sender, least=0)
        if fp8 is not None and not isinstance(fp8, Fp8Scheme | str):
            raise TypeError(f"fp8 must be an Fp8Scheme, the name of a format or None, got {fp8!r}")
        self._like_engine = fp8 == LIKE_ENGINE
        self._scheme = None if self._like_engine else _scheme(fp8)
        self._chunks, self._dtype, self._allow_rounded = model, dtype, allow_rounded
        self._ranks = Ranks(group if group is not None or not dist.is_initialized() else dist.group.WORLD)
        if sender >= self._ranks.size:
            raise ValueError(f"sender must be a rank of the group of {self._ranks.size} ranks, got {sender}")
        self._sender = sender
        with self._ranks.together():
            self._sidecar: Sidecar = find_sidecar(source, source)
            originals = self._sidecar.originals()
            make_current(model)
        with self._ranks.together():
            self._live = LiveTensors(model, group=self._ranks.group)
            self._map = map_trained_model(self._sidecar.hf_config, self._sidecar.infos, self._live.tensors)
            self._sidecar.check_shapes(self._map.hf_shapes)
        self._reception = Reception(self._live, sender)
        self._restorer = Restorer(self._reception, originals)
        self._views: dict[int, list[tuple[str, Tensor]]] = {}
        self._views_state: tuple[Fp8Scheme | None, int] | None = None
        self._storages: frozenset[int] = frozenset()

    @property
    def is_sender(self) -> bool:
        """Whether this rank puts the tensors together."""
        return self._ranks.rank == self._sender

    def contents(self) -> Mapping[str, TensorInfo]:
        """Dtype and shape of every tensor that iteration yields, in its order. Every rank calls it.

        A parameter that is trained in fp32 is sent in 16 bits while its values are exact in 16 bits, so that the result
        can differ after a step.
        """
        if self._like_engine:
            raise ValueError(f"fp8={LIKE_ENGINE!r} needs an engine: call push, or name a format")
        return self._prepare(self._scheme)[1].sent

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every tensor, on the sending rank; nothing on the others, which send their shards.

        Every rank iterates to the end. A tensor may be a view of a parameter: copy what you keep.

        Raises:
            StreamError: at the end, on the other ranks, when the sending rank failed.
        """
        if self._like_engine:
            raise ValueError(f"fp8={LIKE_ENGINE!r} needs an engine: call push, or name a format")
        dtypes, _ = self._prepare(self._scheme)
        return self._iterate(dtypes)

    def _iterate(self, dtypes: Dtypes) -> Generator[tuple[str, Tensor], None, None]:
        error: BaseException | None = None
        try:
            yield from self._tensors(dtypes, self._scheme)
        except GeneratorExit:
            self._ranks.agree(None, self._sender)
            raise
        except BaseException as failure:
            error = failure
        self._ranks.agree(error, self._sender)

    def push(self, sink: Sink | Sequence[Sink], *, version: int) -> Receipt:
        """Send every tensor of this moment to a sink. Every rank calls it; the sink of the sending rank is used.

        Args:
            sink: see `Sink`. Of several sinks, the others go on when one of them fails.
            version: of the weights, which the sink announces.

        Raises:
            StreamError: on the other ranks, when the sending rank failed. The sending rank raises what failed.
        """
        check_count("version", version, least=0)
        start, waited = time.monotonic(), self._reception.seconds
        sinks = SeveralSinks(sink if isinstance(sink, Sequence) else [sink])
        scheme = self._asked_scheme(sinks) if self._like_engine else self._scheme
        dtypes, sent = self._prepare(scheme)
        error: BaseException | None = None
        if self.is_sender:
            upload = Upload(
                version=version, tensors=sent.sent, fp8=scheme, sidecar=self._sidecar, device=self._live.device
            )
            error = _error_of(sinks, lambda: sinks.begin(upload))
        self._ranks.agree(error, self._sender)
        spent = 0.0
        if self.is_sender:
            error, spent = self._feed(sinks, dtypes, scheme)
        else:
            for _ in self._tensors(dtypes, scheme):
                pass
        self._ranks.agree(error, self._sender)
        engines, failed = self._ranks.share((sinks.receipts, sinks.failed), self._sender)
        receipt = Receipt(
            version=version,
            tensors=len(sent.sent),
            nbytes=sent.nbytes,
            widened=dtypes.widened if self._dtype == "trained" else (),
            seconds=time.monotonic() - start,
            gather_seconds=self._reception.seconds - waited,
            sink_seconds=spent,
            engines=engines,
            failed=failed,
        )
        if self.is_sender:
            logger.info("%s", receipt)
        return receipt

    def _asked_scheme(self, sinks: SeveralSinks) -> Fp8Scheme | None:
        """What the engines want, on all ranks."""
        error: BaseException | None = None
        found: Fp8Scheme | None = None
        if self.is_sender:
            try:
                found = sinks.scheme(self._live.device)
            except BaseException as failure:
                error = failure
        self._ranks.agree(error, self._sender)
        scheme: Fp8Scheme | None = self._ranks.share(found, self._sender)
        return scheme

    def _feed(self, sink: Sink, dtypes: Dtypes, scheme: Fp8Scheme | None) -> tuple[BaseException | None, float]:
        """Give every tensor to the sink; what went wrong, and the seconds in the sink."""
        tensors, spent = self._tensors(dtypes, scheme), 0.0

        def everything() -> None:
            nonlocal spent
            for name, tensor in tensors:
                start = time.monotonic()
                sink.write(name, tensor)
                spent += time.monotonic() - start
            start = time.monotonic()
            sink.finish()
            spent += time.monotonic() - start

        error = _error_of(sink, everything)
        tensors.close()  # after an error of the sink: the other ranks send to the end
        return error, spent

    def _prepare(self, scheme: Fp8Scheme | None) -> tuple[Dtypes, Contents]:
        """Bring the parameters up to date, and decide what will be sent."""
        with self._ranks.together():
            make_current(self._chunks)
            self._live.refresh()
        found: Dtypes | None = None
        error: BaseException | None = None
        looked_at = [m for m in self._map.mappings if must_be_read(m, self._live.tensors, self._sidecar)]
        if self.is_sender:
            with self._reception.of(looked_at):
                try:
                    found = self._decide_dtypes()
                except BaseException as failure:
                    error = failure
        else:
            for mapping in looked_at:
                self._send(mapping)
        self._ranks.agree(error, self._sender)
        dtypes: Dtypes = self._ranks.share(found, self._sender)
        return dtypes, contents(self._map.mappings, dtypes.infos, scheme)

    def _decide_dtypes(self) -> Dtypes:
        found = decide_dtypes(self._map.mappings, self._restorer, self._sidecar, self._dtype)
        if found.rounded and not self._allow_rounded:
            raise CheckpointError(
                "the model holds fewer bits of these tensors than the source: "
                f"{listing(list(found.rounded))}. Pass allow_rounded=True to send them"
            )
        return found

    def _tensors(self, dtypes: Dtypes, scheme: Fp8Scheme | None) -> Generator[tuple[str, Tensor], None, None]:
        if not self.is_sender:
            for mapping in self._map.mappings:
                self._send(mapping)
            return
        with self._reception.of(self._map.mappings):
            views = self._views_for(scheme)
            for at, mapping in enumerate(self._map.mappings):
                known = views.get(at)
                if known is not None:
                    self._reception.skip(mapping)
                    yield from known
                    continue
                found: list[tuple[str, Tensor]] | None = []
                for spec, tensor in zip(mapping.hf, self._restorer.restore(mapping).hf, strict=True):
                    info = dtypes.infos[spec.name]
                    for name, values in sent_tensors(mapping, spec, info, tensor.to(info.dtype), scheme):
                        found = self._with_view(found, name, values)
                        yield name, values
                if found is not None:
                    views[at] = found

    def _views_for(self, scheme: Fp8Scheme | None) -> dict[int, list[tuple[str, Tensor]]]:
        """Tensors that are views of parameters, by the place of their mapping: they are the same at every push.

        Nothing is copied or received for them, and it takes longer to find a small one than to copy it.
        """
        state = (scheme, self._live.generation)
        if self._views_state != state:
            self._views_state, self._views = state, {}
            self._storages = self._live.storages()
        return self._views

    def _with_view(
        self, found: list[tuple[str, Tensor]] | None, name: str, values: Tensor
    ) -> list[tuple[str, Tensor]] | None:
        if found is None or values.untyped_storage().data_ptr() not in self._storages:
            return None
        return [*found, (name, values)]

    def _send(self, mapping: TensorMapping) -> None:
        for spec in mapping.megatron:
            self._live.gather(spec.name, spec.index, to=self._sender)


def _scheme(fp8: Fp8Scheme | str | None) -> Fp8Scheme | None:
    """A scheme by the name of its format, or like that of a model's directory."""
    if not isinstance(fp8, str):
        return fp8
    return detect_scheme(fp8.removeprefix("like:")) if fp8.startswith("like:") else named_scheme(fp8)


def _error_of(sink: Sink, action: Callable[[], None]) -> BaseException | None:
    """What an action raises, after the sink has heard of it: the other ranks must hear of it before this one stops."""
    try:
        action()
    except BaseException as error:
        try:
            sink.abort(error)
        except BaseException as another:
            error.add_note(f"The sink failed again when it heard of this: {type(another).__name__}: {another}")
        return error
    return None
