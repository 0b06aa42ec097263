"""The weight-transfer engine that runs in every worker of vLLM.

A push is all or nothing. vLLM itself accepts half of a model, and a failure in its `finish_weight_update` leaves the
worker unable to begin again. So everything that can fail happens in `update_weights`, whose failures vLLM forgets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import os
from collections.abc import Callable, Iterator
from typing import Any

import megatron_fp32.needs_vllm  # noqa: F401  # isort: skip
import torch
import vllm
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_fp32 import __version__
from megatron_fp32.errors import TransferError, listing
from megatron_fp32.transfer.manifest import Manifest
from megatron_fp32.transfer.receiver import Receiver, Stage
from megatron_fp32.transfer.rendezvous import Invitation, is_loopback
from megatron_fp32.vllm_plugin.lease import Lease
from megatron_fp32.vllm_plugin.loaded import Loaded, forget_packed_experts

TOKEN = "MEGATRON_FP32_TOKEN"
"""Environment variable of the engine: the secret that an invitation must carry."""


@dataclasses.dataclass
class InitInfo(WeightTransferInitInfo):
    """An invitation to a trainer's store; see `Invitation`."""

    address: str
    port: int
    secret: str
    world_size: int
    timeout: float
    token: str | None = None
    lease: float = 0.0
    """Seconds after which the engine acts when the trainer is gone; 0 for never."""
    url: str | None = None
    """Of the engine, as the trainer reaches it."""


@dataclasses.dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Which push to receive, or that the begun one is given up."""

    push: int
    secret: str
    """Of the invitation, so that another trainer cannot end or replace a push."""
    stage: Stage = "device"
    cancel: bool = False
    version: str | None = None
    """Of the engine's weights before the push; None where vLLM knows no versions."""


class ReceivingEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives checkpoints from `megatron_fp32.streaming.VllmSink`."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiver: Receiver | None = None
        self._lease: Lease | None = None
        self._begun = False
        self._complete = False
        self._version = "default"
        """Of the last push that was complete. vLLM gives this name to weights that it has loaded itself."""
        self._half = False
        """Whether the model holds a part of a push that has failed, of whichever trainer."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Accept an invitation, and join the trainer.

        Raises:
            ValueError: without the token of this engine, or, when it has none, from another machine.
            RuntimeError: while the push of a trainer that lives has begun.
        """
        _check_token(init_info)
        if (self._begun or self._complete) and self._lease is not None and self._lease.trainer_lives():
            raise RuntimeError("another push has begun and is not finished: this engine takes one at a time")
        before = self._lease
        self._leave()
        config = self.parallel_config
        invitation = Invitation(
            address=init_info.address,
            port=init_info.port,
            secret=init_info.secret,
            world_size=init_info.world_size,
            timeout=init_info.timeout,
        )
        rank = config.data_parallel_index * config.world_size + config.rank
        self._receiver = Receiver(invitation, rank=rank, device=self.device, about=self._about())
        self._receiver.meet()
        url = init_info.url if config.rank == 0 else None
        self._lease = Lease(
            invitation,
            seconds=init_info.lease,
            url=url,
            version=self._version,
            half=self._half,
            before=before,
        )

    def start_weight_update(self) -> None:
        """Begin a push. The model is touched when its first tensors are there.

        Raises:
            RuntimeError: without an invitation.
        """
        if self._receiver is None or self._lease is None:
            raise RuntimeError("no trainer has invited this engine: call init_weight_transfer_engine first")
        self._lease.begin()
        self._begun, self._complete = True, False

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive a whole push, and load it.

        vLLM's own method waits for an accelerator, which a CPU build does not have.
        """
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Receive a push; on every failure the engine has no version, and can begin again.

        Raises:
            TransferError: when the push is not whole, or is given up.
            RuntimeError: for the push of another trainer.
        """
        receiver, lease = self._receiver, self._lease
        if receiver is None or lease is None:
            raise RuntimeError("no trainer has invited this engine: call init_weight_transfer_engine first")
        self._begun = False  # vLLM forgets an update that raises
        if not hmac.compare_digest(update_info.secret, receiver.invitation.secret) and lease.trainer_lives():
            raise RuntimeError("another trainer has connected to this engine since: this push is refused")
        if update_info.cancel:
            raise TransferError("the push was given up")
        lease.version = update_info.version or lease.version
        loading = _Loading(self)
        try:
            receiver.receive(update_info.push, loading.load, loading.finish, stage=update_info.stage)
        except BaseException:
            self._half = lease.half = self._half or loading.touched
            loading.abandon()
            raise
        self._complete, self._half, self._version = True, False, str(loading.version)
        lease.complete(self._version)

    def finish_weight_update(self) -> None:
        """Give vLLM's word that the update is over.

        Raises:
            RuntimeError: when no whole push has come.
        """
        if not self._complete:
            raise RuntimeError("the push is not whole: this engine has no version")
        self._complete = False

    def shutdown(self) -> None:
        """Leave the trainer."""
        self._leave()

    @staticmethod
    def trainer_send_weights(iterator: Iterator[tuple[str, Tensor]], trainer_args: Any) -> None:
        """vLLM 0.26 declares this abstract; the trainer uses `VllmSink` instead."""
        raise NotImplementedError("send with megatron_fp32.streaming.VllmSink")

    def _leave(self) -> None:
        if self._lease is not None:
            self._lease.end()
        if self._receiver is not None:
            self._receiver.close()
        self._receiver, self._lease = None, None
        self._begun = self._complete = False

    def _about(self) -> dict[str, Any]:
        """What the trainer may want to know of this engine."""
        config = self.model_config.hf_config
        text = getattr(config, "text_config", None)
        quantization = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None)
        return {
            "engine": f"vllm {vllm.__version__}",
            "plugin": __version__,
            "model": str(self.model_config.model),
            "quantization": quantization if isinstance(quantization, dict) else None,
            "dtype": str(self.model_config.dtype),
            "head_dtype": str(getattr(self.model_config, "head_dtype", self.model_config.dtype)),
        }


class _Loading:
    """One push on its way into vLLM's model."""

    def __init__(self, engine: ReceivingEngine) -> None:
        self._model: nn.Module = engine.model
        self._load_weights: Callable[[list[tuple[str, Tensor]]], set[str] | None] = engine.model.load_weights
        self._config = engine.model_config
        self._device = engine.device
        self._loaded = Loaded(self._model)
        self.touched = False
        self.version: int | None = None
        """Of a push that is complete."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0

    def load(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Give tensors to vLLM, which puts a module together when its last tensor has come."""
        if not self.touched:
            self.touched = True
            forget_packed_experts(self._model)
            initialize_layerwise_reload(self._model)
        with _half_models_allowed():
            self._loaded.add(tensors, self._load_weights(tensors))

    def abandon(self) -> None:
        """Give the model its own tensors back: it can run, but some of its modules have new values.

        vLLM would add the tensors of the next push to those that a module has got from this one, and would fail on
        meta tensors when it is asked to generate.
        """
        if not self.touched:
            return
        for module in self._model.modules():
            info = get_layerwise_info(module)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        finalize_layerwise_reload(self._model, self._config)

    def finish(self, manifest: Manifest) -> dict[str, Any]:
        """Complete the model.

        Raises:
            TransferError: when parameters of the model have got no tensor.
        """
        if not self.touched:
            raise TransferError("the push has no tensors")
        missing = self._loaded.missing(manifest)
        if missing:
            raise TransferError(f"these parameters of the engine's model have got no tensor: {listing(missing)}")
        finalize_layerwise_reload(self._model, self._config)
        self.version = manifest.version
        peak = torch.cuda.max_memory_allocated(self._device) - self._before if self._device.type == "cuda" else None
        return {"rounded": self._loaded.rounded(), "peak_bytes": peak}


@contextlib.contextmanager
def _half_models_allowed() -> Iterator[None]:
    """A bucket is a part of a model: vLLM 0.32 wants MTP layers to be whole in every call."""
    try:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
    except ImportError:
        yield
        return
    with disable_mtp_completeness_check():
        yield


def _check_token(info: InitInfo) -> None:
    expected = os.environ.get(TOKEN)
    if expected is None and not is_loopback(info.address):
        raise ValueError(
            f"the trainer is at {info.address}, and this engine has no token: start the engine and VllmSink with the "
            f"same {TOKEN} to accept trainers of other machines"
        )
    if expected is not None and not hmac.compare_digest((info.token or "").encode(), expected.encode()):
        raise ValueError(f"the invitation does not carry this engine's {TOKEN}")
