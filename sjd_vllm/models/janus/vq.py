"""The VQ autoencoder of Janus: Transformers' modules, with the weights of either published layout.

Codes are compared and decoded as unit vectors (janus/models/vq_model.py, `codebook_l2_norm`). Transformers' own
`encode` leaves that out, so the nearest code is found here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE, JanusVQVAEAttnBlock

from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.janus.config import JanusShape
from sjd_vllm.models.janus.names import vq_tensors
from sjd_vllm.models.pixel_attention import pixel_attention
from sjd_vllm.models.tensors import Shape, read_tensors

_PICTURES_AT_ONCE = 4  # a map of one picture at full size takes 75 MB in float32


class FusedAttnBlock(JanusVQVAEAttnBlock):  # type: ignore[misc]
    """The same attention over all positions of a map, without a matrix of scores."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.norm(hidden_states)
        query, key, value = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = pixel_attention(query, key, value).transpose(1, 2).reshape(hidden_states.shape)
        out: Tensor = hidden_states + self.proj_out(attended)
        return out


class JanusVQ(nn.Module):
    """Codes to pixels and back, float32.

    Args:
        shape: of the checkpoint.
        checkpoint: its folder.
    """

    _vectors: Tensor

    def __init__(self, shape: JanusShape, checkpoint: Path) -> None:
        super().__init__()
        self._model = _empty(shape)
        own_name = {tensor.name: name for name, tensor in vq_tensors(shape, _shapes(self._model)).items()}
        weights = {
            own_name[name]: tensor.float() for name, tensor in read_tensors(weight_files(checkpoint), own_name.keys())
        }
        self._model.load_state_dict(weights, assign=True)
        for module in self._model.modules():
            if isinstance(module, JanusVQVAEAttnBlock):
                module.__class__ = FusedAttnBlock
        vectors = F.normalize(self._model.quantize.embedding.weight.detach(), dim=-1)
        self.register_buffer("_vectors", vectors, persistent=False)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes long [B, rows, columns], any number of rows -> pixels [B, 3, height, width], about [-1, 1]."""
        return torch.cat([self._decode(few).cpu() for few in torch.split(codes, _PICTURES_AT_ONCE)])

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, height, width] in [-1, 1] -> the nearest codes, long [B, rows, columns]."""
        latents = self._model.quant_conv(self._model.encoder(pixels)).movedim(1, -1)
        return (F.normalize(latents, dim=-1) @ self._vectors.T).argmax(-1)

    def _decode(self, codes: Tensor) -> Tensor:
        vectors = F.embedding(codes, self._vectors).movedim(-1, 1).contiguous()
        out: Tensor = self._model.decoder(self._model.post_quant_conv(vectors))
        return out


def vq_shapes(shape: JanusShape) -> dict[str, Shape]:
    """Name and shape of the autoencoder's tensors, as Transformers calls them."""
    return _shapes(_empty(shape))


def _empty(shape: JanusShape) -> JanusVQVAE:
    with torch.device("meta"):
        return JanusVQVAE(JanusVQVAEConfig(**shape.vq)).eval()


def _shapes(model: JanusVQVAE) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
