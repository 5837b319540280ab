"""GPU memory of the pixel decoders of the published checkpoints: computed from their shapes, not measured.

Each decoder is built on PyTorch's meta device, where tensors have shapes and no numbers, and decodes as many pictures
as it does at once, and encodes one. `weights_mib` are its float32 weights, `maps_mib` the most that all other tensors
hold at any one time. Attention is taken to run fused, without a matrix of scores. On a GPU the process's CUDA context,
cuDNN's workspaces and what the allocator rounds up come on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows

RESULTS = Path(__file__).parent / "results" / "pixel_memory.csv"
PIXELS_AT_ONCE = 1 << 20  # no decoder takes more in a slice
_MIB = 1 << 20


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the mode hold at any one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for one in tree_leaves(out):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if storage._cdata not in known:  # not a view, not in place
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def chameleon() -> nn.Module:
    """Also Lumina-mGPT's."""
    from transformers import ChameleonConfig

    from sjd_vllm.models.chameleon.vq import ChameleonVQ, vq_shape

    return ChameleonVQ(vq_shape(Path("nowhere"), ChameleonConfig()))


def lumina_mgpt2() -> nn.Module:
    from sjd_vllm.models.lumina_mgpt2.vq import MoVQ, MoVQShape

    return MoVQ(MoVQShape())


def emu3() -> nn.Module:
    from sjd_vllm.models.emu3 import vq

    out = vq.Emu3VQ.__new__(vq.Emu3VQ)
    nn.Module.__init__(out)
    out._model = vq.Emu3VQVAE(vq.Emu3VQVAEConfig())
    out._num_frames = out._model.config.temporal_downsample_factor
    _fuse(out, vq.Emu3VQVAEAttentionBlock, vq.FusedAttentionBlock)
    return out


def janus() -> nn.Module:
    from sjd_vllm.models.janus import config, vq

    out = vq.JanusVQ.__new__(vq.JanusVQ)
    nn.Module.__init__(out)
    out._model = vq.JanusVQVAE(vq.JanusVQVAEConfig(**config._VQ_16, image_token_embed_dim=4096))
    out.register_buffer("_vectors", out._model.quantize.embedding.weight.detach().clone())
    _fuse(out, vq.JanusVQVAEAttnBlock, vq.FusedAttnBlock)
    return out


def llamagen(levels: tuple[int, ...]) -> nn.Module:
    from sjd_vllm.models.llamagen.vq import LlamaGenVQ, VQShape

    shape = VQShape(num_codes=16384, code_dim=8, base_channels=128, levels=levels, num_blocks=2, latent_channels=256)
    return LlamaGenVQ(shape)


def simplear() -> nn.Module:
    from sjd_vllm.models.simplear.vq import CosmosDecoder, CosmosShape

    return CosmosDecoder(CosmosShape())


def flan_t5_xl() -> nn.Module:
    """LlamaGen's text encoder (google/flan-t5-xl's config.json)."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


# decoder, what makes it, pixels a code, the largest picture's sides
DECODERS: tuple[tuple[str, Callable[[], nn.Module], int, int, int], ...] = (
    ("chameleon", chameleon, 16, 512, 512),
    ("lumina_mgpt 768", chameleon, 16, 768, 768),
    ("lumina_mgpt 1024", chameleon, 16, 1024, 1024),
    ("lumina_mgpt2", lumina_mgpt2, 8, 768, 768),
    ("emu3", emu3, 8, 720, 720),
    ("janus", janus, 16, 384, 384),
    ("llamagen ds16", lambda: llamagen((128, 128, 256, 256, 512)), 16, 512, 512),
    ("llamagen ds8", lambda: llamagen((128, 256, 256, 512)), 8, 256, 256),
    ("simplear", simplear, 16, 1024, 1024),
)


def row(name: str, make: Callable[[], nn.Module], side: int, width: int, height: int) -> dict[str, object]:
    """Weights, and the peak of decoding a slice of a batch and of encoding one picture."""
    at_once = -(-PIXELS_AT_ONCE // (width * height))
    with torch.device("meta"), _as_on_a_gpu():
        vq: Any = make().eval()
        with PeakBytes() as decoding:
            vq.decode(torch.zeros(at_once, height // side, width // side, dtype=torch.long))
        with PeakBytes() as encoding:
            if hasattr(vq, "encode"):
                vq.encode(torch.zeros(1, 3, height, width))
    return {
        "decoder": name,
        "size": f"{width}x{height}",
        "weights_mib": round(_bytes(vq) / _MIB),
        "maps_mib": round(max(decoding.peak, encoding.peak) / _MIB),
    }


def _bytes(module: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in (*module.parameters(), *module.buffers()))


def _fuse(module: nn.Module, kind: type, fused: type) -> None:
    for one in module.modules():
        if isinstance(one, kind):
            one.__class__ = fused


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """PyTorch's attention on the meta device would make the matrix of scores, and nothing there can be brought back."""
    attention = mock.patch.object(
        nn.functional, "scaled_dot_product_attention", lambda query, *_: query.new_empty(query.shape)
    )
    with attention, mock.patch.object(Tensor, "cpu", lambda tensor: tensor):
        yield


def main() -> None:
    """Write a row a decoder, and one of LlamaGen's text encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help=f"file of rows ({RESULTS})")
    given = parser.parse_args()
    rows = [row(*decoder) for decoder in DECODERS]
    with torch.device("meta"):
        encoder = flan_t5_xl()
    rows.append({"decoder": "llamagen text", "size": "", "weights_mib": round(_bytes(encoder) / _MIB), "maps_mib": ""})
    append_rows(given.output, [{**provenance(), **one} for one in rows])
    for one in rows:
        print(
            f"{one['decoder']:18} {one['size']:10} weights {one['weights_mib']:>6} MiB, maps {one['maps_mib']:>6} MiB"
        )


if __name__ == "__main__":
    main()
