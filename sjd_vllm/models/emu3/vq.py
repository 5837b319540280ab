"""The vision tokenizer of Emu3: Transformers' modules, with the weights of either published layout.

It is made for video: pixels of T frames become ceil(T / 4) frames of codes and back. A picture is one frame of codes;
it is encoded as four equal frames and decoded to four of which the authors keep the first (modeling_emu3visionvq.py,
`encode`, `decode`). Only layers over time join frames, and those run on latents, so here the layers over space see one
frame, a quarter of the authors' work with the same result.

Every norm over space takes its statistics from the whole map, so the pixels of some first rows alone are a preview:
close to those rows of the finished picture, not equal to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAE, Emu3VQVAEAttentionBlock

from sjd_vllm.models.emu3.config import Emu3Shape
from sjd_vllm.models.emu3.names import published_vq
from sjd_vllm.models.pixel_attention import pixel_attention
from sjd_vllm.models.tensors import Shape, differences, read_tensors, tensor_shapes

_PIXELS_AT_ONCE = 1 << 19  # a map of 256 channels over as many takes 0.5 GiB in float32


class FusedAttentionBlock(Emu3VQVAEAttentionBlock):  # type: ignore[misc]
    """The same attention over all positions of a map, without a matrix of scores."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        return self.out_proj(pixel_attention(query, key, value)), None


class Emu3VQ(nn.Module):
    """Codes to pixels and back, float32.

    Args:
        shape: of the checkpoint.
        files: those that hold the tokenizer's weights, among others or alone.
    """

    def __init__(self, shape: Emu3Shape, files: list[Path]) -> None:
        super().__init__()
        self._model = _empty(shape)
        self._num_frames = self._model.config.temporal_downsample_factor
        shapes = _shapes(self._model)
        problems = vq_problems(shape, files)
        if problems:
            raise ValueError("the vision tokenizer of this Emu3 checkpoint cannot be loaded: " + "; ".join(problems))
        own = {name: own for own, (name, _) in published_vq(shapes, tensor_shapes(files)).items()}
        weights = {own[name]: tensor for name, tensor in read_tensors(files) if name in own}
        self._model.load_state_dict(
            {name: _float32(tensor).reshape(shapes[name]) for name, tensor in weights.items()}, assign=True
        )
        for module in self._model.modules():
            if isinstance(module, Emu3VQVAEAttentionBlock):
                module.__class__ = FusedAttentionBlock

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes long [B, rows, columns], any number of rows -> pixels [B, 3, height, width], about [-1, 1]."""
        pixels = codes[0].numel() * self._model.spatial_scale_factor**2
        return torch.cat([self._decode(few).cpu() for few in torch.split(codes, max(1, _PIXELS_AT_ONCE // pixels))])

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, height, width] in [-1, 1] -> the nearest codes, long [B, rows, columns]."""
        model, encoder = self._model, self._model.encoder
        maps = encoder.middle_block(encoder.down_block(encoder.conv_in(pixels)))
        latents = encoder.conv_out(F.silu(encoder.norm_out(maps)))
        # [B, C, T, rows, columns] from here on
        latents = latents[:, :, None].repeat(1, 1, self._num_frames, 1, 1)
        for layer in encoder.time_conv:
            latents = F.silu(layer(latents))
        for layer in encoder.time_res_stack:
            latents = layer(latents)
        codes: Tensor = model.quantize(model.quant_conv(latents).transpose(1, 2))
        return codes[:, 0]

    def _decode(self, codes: Tensor) -> Tensor:
        model, decoder = self._model, self._model.decoder
        vectors = model.quantize.embedding(codes).movedim(-1, 1)[:, :, None]
        # The latents and the vectors that steer the norms go through the same layers over time.
        both = torch.cat([model.post_quant_conv(vectors), vectors])
        for layer in decoder.time_res_stack:
            both = layer(both)
        for layer in decoder.time_conv:
            both = F.silu(layer(both))
        latents, steering = both[:, :, 0].chunk(2)
        maps = decoder.up_block(decoder.middle_block(decoder.conv_in(latents), steering), steering)
        out: Tensor = decoder.conv_out(F.silu(decoder.norm_out(maps, steering)))
        return out


def vq_problems(shape: Emu3Shape, files: list[Path]) -> list[str]:
    """The tokenizer's tensors that are missing or misshapen in some files, whatever else is in them."""
    found = tensor_shapes(files)
    expected = dict(published_vq(_shapes(_empty(shape)), found).values())
    return differences(expected, {name: found[name] for name in expected if name in found})


def vq_names(shape: Emu3Shape, names: Iterable[str]) -> set[str]:
    """Published names of the tokenizer's tensors in a checkpoint with some of these names."""
    return {name for name, _ in published_vq(_shapes(_empty(shape)), names).values()}


def _empty(shape: Emu3Shape) -> Emu3VQVAE:
    with torch.device("meta"):
        return Emu3VQVAE(Emu3VQVAEConfig(**shape.vq)).eval()


def _shapes(model: Emu3VQVAE) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor  # BatchNorm's counters are integers
