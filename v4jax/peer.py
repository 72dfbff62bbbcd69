"""The transformers implementation of the model, as the other side of `v4jax bench model` and `v4jax verify`."""

import copy
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.checkpoint.names import Section, Spelling, section_parameters, sections, stored_tensors
from v4jax.checkpoint.reader import Checkpoint
from v4jax.compilation import jit
from v4jax.config import ModelConfig
from v4jax.cost import Run, Workload, timed
from v4jax.errors import UserError
from v4jax.model.inputs import Choices
from v4jax.model.transformer import Transformer
from v4jax.train.recipes import TrainOptions

_CONTEXT_CHUNK = 128
"""The peer's eager attention holds [batch, heads, chunk, context] scores: contexts are filled in such chunks."""


class Transformers:
    """Its DeepseekV4ForCausalLM with our weights, in eager attention, its only one, with grouped expert products."""

    def __init__(self, config: ModelConfig, model: Transformer, training: TrainOptions, threads: int) -> None:
        try:
            import torch
            from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
        except ImportError as error:
            raise UserError(
                f"--against transformers: {error.name} is not installed; pip install 'v4jax[parity]'"
            ) from None
        torch.set_num_threads(threads)
        self._torch = torch
        self.config, self.training = config, training
        settings: dict[str, Any] = config.to_hf() | {"attn_implementation": "eager"}
        with torch.no_grad():
            self.module = DeepseekV4ForCausalLM(DeepseekV4Config(**settings)).float()
            _copy_weights(model, config, self.module.state_dict(), torch.from_numpy)

    def _tokens(self, work: Workload) -> Any:
        return self._torch.from_numpy(work.draw(self.config.vocab_size)).long().to(self.module.device)

    def logit_difference(self, model: Transformer) -> float:
        """The largest difference of any logit from ours, on one prompt: whether both sides do the same work.

        Ours takes the experts that the peer has chosen: where two are nearly tied, rounding decides.
        """
        tokens = Workload("prefill", 1, 256).draw(self.config.vocab_size)
        chosen: list[np.ndarray] = []
        hooks = [_on_routing(layer, chosen.append) for layer in self.module.model.layers]
        with self._torch.inference_mode():
            theirs = self.module(self._torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
        for hook in hooks:
            hook.remove()
        replay = tuple(Choices(jnp.asarray(experts.reshape(*tokens.shape, -1))) for experts in chosen)
        return float(np.abs(np.asarray(_replayed_logits(model.unstack(), tokens, replay)) - theirs).max())

    def prefill(self, work: Workload) -> Run:
        """A forward pass into a new cache, logits of the last position."""
        tokens = self._tokens(work)

        def prefill() -> None:
            with self._torch.inference_mode():
                self._next_token(tokens, self._new_cache())

        return timed(prefill)

    def decode(self, work: Workload) -> Run:
        """One forward pass per token, with the model's own cache: a copy of the context's each time."""
        context, first = self._new_cache(), None
        with self._torch.inference_mode():
            for chunk in self._tokens(work).split(_CONTEXT_CHUNK, dim=1):
                first = self._next_token(chunk, context)

        def decode() -> float:
            token, cache = first, copy.deepcopy(context)
            start = time.perf_counter()
            with self._torch.inference_mode():
                for _ in range(work.steps):
                    token = self._next_token(token, cache)
            return time.perf_counter() - start

        return decode

    def train(self, work: Workload) -> Run:
        """Transformers' own loss, and torch's fused AdamW, its Trainer's default."""
        tokens = self._tokens(work)
        own = self.training
        adamw = self._torch.optim.AdamW(
            self.module.parameters(),
            lr=own.learning_rate,
            betas=(own.beta1, own.beta2),
            eps=own.epsilon,
            weight_decay=own.weight_decay,
            fused=True,
        )
        self.module.train()

        def train() -> None:
            adamw.zero_grad(set_to_none=True)
            self.module(tokens, labels=tokens, use_cache=False).loss.backward()
            self._torch.nn.utils.clip_grad_norm_(self.module.parameters(), own.clip)
            adamw.step()

        return timed(train)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.module.config)

    def _next_token(self, tokens: Any, cache: Any) -> Any:
        logits = self.module(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


@jit
def _replayed_logits(model: Transformer, tokens: jax.Array, replay: tuple[Choices, ...]) -> jax.Array:
    return model.logits(model.hidden(tokens, replay=replay).hidden)


def _on_routing(layer: Any, take: Callable[[np.ndarray], None]) -> Any:
    """Gives `take` the experts [tokens, K] of each call of a layer's router, until the returned hook is removed."""
    return layer.mlp.gate.register_forward_hook(lambda _, __, output: take(output[2].numpy()))


def _copy_weights(
    model: Transformer, config: ModelConfig, state: dict[str, Any], as_tensor: Callable[[np.ndarray], Any]
) -> None:
    """Writes our weights into transformers' tensors, whose expert matrices hold all experts, w1 over w3."""
    top, layers, _ = model.to_tensors()
    for section, tensors in zip(sections(config), (top, *layers), strict=True):
        for parameter in section_parameters(config, section):
            for index, stored in enumerate(stored_tensors(section, parameter, Spelling.TRANSFORMERS)):
                target, value = state[stored.name], tensors[parameter.key]
                if stored.slab is not None:
                    target, value = target[stored.slab], value[index]
                target = target if stored.rows is None else target[stored.rows]
                target.copy_(as_tensor(np.array(value)))  # a copy: torch wants to be able to write


# ---- layer by layer --------------------------------------------------------------------------------------------------
class PeerLayer(NamedTuple):
    """What a layer of transformers' made."""

    streams: np.ndarray
    """float32 [B, S, C, D] after it."""
    experts: np.ndarray
    """int [B, S, K]: where its router sent each token."""


class StreamedPeer:
    """One forward pass of transformers' own model in float32, which gets each layer's weights when it comes to it.

    Args:
        checkpoint: opened.
        tokens: int32 [B, S].

    Raises:
        UserError: torch or transformers is missing.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray) -> None:
        try:
            import torch
            from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
        except ImportError as error:
            raise UserError(
                f"--against transformers: {error.name} is not installed; pip install 'v4jax[parity]'"
            ) from None
        self.layers: list[PeerLayer] = []
        chosen: list[np.ndarray] = []
        settings: dict[str, Any] = checkpoint.config.to_hf() | {
            "attn_implementation": "eager",
            "experts_implementation": "eager",
            "use_cache": False,
        }
        settings.pop("quantization_config", None)
        config = DeepseekV4Config(**settings)
        with torch.device("meta"):
            model: Any = DeepseekV4ForCausalLM(config).float().eval()
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RotaryEmbedding"):  # its tables are computed, not loaded
                model.set_submodule(name, type(module)(config))
        layers = list(model.model.layers)

        def load(module: Any, section: Section, prefix: str) -> None:
            state = _transformers_tensors(checkpoint, section)
            names = {name.removeprefix(prefix): torch.from_numpy(array) for name, array in state.items()}
            missing, unexpected = module.load_state_dict(names, strict=False, assign=True)
            if unexpected or (prefix and missing):
                raise UserError(f"transformers' model does not fit: missing {missing}, unexpected {unexpected}")

        def before(layer: Any, *_: Any) -> None:
            load(layer, ("layers", layers.index(layer)), f"model.layers.{layers.index(layer)}.")

        def after(layer: Any, _: Any, streams: Any) -> None:
            experts = chosen.pop().reshape(*tokens.shape, -1)
            self.layers.append(PeerLayer(streams.numpy(), experts))
            layer.to("meta")

        for layer in layers:
            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(after)
            _on_routing(layer, chosen.append)
        load(model, "top", "")
        with torch.inference_mode():
            self.logits: np.ndarray = model(torch.from_numpy(tokens).long()).logits.float().numpy()


def _transformers_tensors(checkpoint: Checkpoint, section: Section) -> dict[str, np.ndarray]:
    """One section under transformers' names, float32; hash tables int64."""
    state: dict[str, np.ndarray] = {}
    for key, values in checkpoint.section(section).items():
        parameter = next(one for one in section_parameters(checkpoint.config, section) if one.key == key)
        for index, stored in enumerate(stored_tensors(section, parameter, Spelling.TRANSFORMERS)):
            if stored.slab is None:
                state[stored.name] = values.astype(np.int64) if values.dtype == np.int32 else values
                continue
            target = state.setdefault(stored.name, np.empty(stored.shape, np.float32))[stored.slab]
            target[stored.rows or slice(None)] = values[index]
    return state
