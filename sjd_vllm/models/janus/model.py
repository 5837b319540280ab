"""Janus for vLLM: a Llama whose rows are embedded and scored by what they hold, text or a code of a picture.

Ids below `text_vocab_size` are text; `text_vocab_size` + c is code c. Text is embedded by the language model's table,
a code by `gen_embed` and the MLP behind it. A row is scored by the generation head where a code must follow, that is
after <begin_of_image> and after a code, and by the text head everywhere else; the columns of the other vocabulary are
-inf.

Which head a row needs follows from the row's own input id, and nothing else. `forward` hands it on as one more column
of the hidden states, 1 or 0, because vLLM passes `compute_logits` the chosen rows of the hidden states alone. So the
choice travels with the row: windows of drafts, chunks of a prompt, mixed batches, CUDA graphs and ranks need no state
here. A head that no row needs is not computed, which costs one number read from the device in a step.

The parts that understand pictures (SigLIP and its aligner) are not loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from sjd_vllm.models.accounting import rule_of
from sjd_vllm.models.janus.config import JanusShape
from sjd_vllm.models.janus.names import OWN_LAYERS, is_known, language_tensors, own_name, unused_names, vq_prefix
from sjd_vllm.models.llama_weights import load_checked


class CodeAligner(nn.Module):
    """The MLP from a code's vector to the width of the language model (`MlpProjector`, "mlp_gelu").

    Its layers are sharded by columns and by rows in turn, so every second one ends with the sum over ranks.
    """

    def __init__(self, shape: JanusShape, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.depth = shape.aligner_depth
        for index in range(self.depth):
            is_last = index == self.depth - 1
            fan_in = shape.code_dim if index == 0 else shape.hidden_size
            name = f"{prefix}.{index}"
            layer = (
                ColumnParallelLinear(
                    fan_in, shape.hidden_size, gather_output=is_last, quant_config=quant_config, prefix=name
                )
                if index % 2 == 0
                else RowParallelLinear(fan_in, shape.hidden_size, quant_config=quant_config, prefix=name)
            )
            self.add_module(str(index), layer)

    def forward(self, vectors: Tensor) -> Tensor:
        """[N, code_dim] -> [N, hidden]."""
        out = vectors
        for index in range(self.depth):
            out, _ = self.get_submodule(str(index))(F.gelu(out) if index else out)
        return out


class GenerationHead(nn.Module):
    """Scores of codes: two layers with a GELU between them (`vision_head`)."""

    def __init__(self, shape: JanusShape, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.proj = ColumnParallelLinear(
            shape.hidden_size,
            shape.head_dim,
            gather_output=True,
            quant_config=quant_config,
            prefix=f"{prefix}.proj",
        )
        self.codes = ParallelLMHead(
            shape.num_codes, shape.head_dim, bias=True, quant_config=quant_config, prefix=f"{prefix}.codes"
        )
        self.logits_processor = LogitsProcessor(shape.num_codes)

    def forward(self, hidden_states: Tensor) -> Tensor | None:
        """[N, hidden] -> logits [N, codes]; None on ranks that gather none."""
        inside, _ = self.proj(hidden_states)
        logits: Tensor | None = self.logits_processor(self.codes, F.gelu(inside), self.codes.bias)
        return logits


@support_torch_compile
class JanusModel(LlamaModel):  # type: ignore[misc]
    """The Llama with both embeddings inside what vLLM compiles: its graphs read the ids where they always are."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        shape = JanusShape(**config.janus)
        text_config = copy.deepcopy(config)
        text_config.vocab_size = shape.text_vocab_size
        super().__init__(vllm_config=vllm_config.with_hf_config(text_config), prefix=prefix)
        self.num_text_ids = shape.text_vocab_size
        self.gen_embed = VocabParallelEmbedding(shape.num_codes, shape.code_dim)
        self.gen_aligner = CodeAligner(shape, vllm_config.quant_config, maybe_prefix(prefix, "gen_aligner"))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Text and codes: [N] -> [N, hidden]. Every row is embedded both ways, so that graphs can be captured."""
        codes = input_ids - self.num_text_ids
        text = self.embed_tokens(input_ids.clamp(max=self.num_text_ids - 1))
        image = self.gen_aligner(self.gen_embed(codes.clamp(min=0)))
        return torch.where((codes >= 0)[:, None], image, text)


class JanusForImageGeneration(nn.Module, SupportsQuant):  # type: ignore[misc]
    """The served model; its config is made by `sjd_vllm.models.janus.config.served_config`."""

    packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping
    # vLLM translates the names of layers in a quantisation config by it, such as those to leave alone
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            re.compile(rf"^{re.escape(published)}(?=\.|$)"): own for published, own in OWN_LAYERS.items()
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.config = config
        self.shape = JanusShape(**config.janus)
        self.begin_of_image_id: int = config.begin_of_image_id
        self.model = JanusModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.shape.text_vocab_size,
            self.shape.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if not self.shape.has_lm_head:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.gen_head = GenerationHead(self.shape, quant_config, maybe_prefix(prefix, "gen_head"))
        self.logits_processor = LogitsProcessor(self.shape.text_vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Text and codes: [N] -> [N, hidden]."""
        out: Tensor = self.model.embed_input_ids(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, hidden + 1]; the last column is 1 where a code must follow, 0 elsewhere.

        Raises ValueError for embeddings in place of ids, which do not say what they hold.
        """
        if input_ids is None or intermediate_tensors is not None:
            raise ValueError("Janus takes token ids: neither prompt embeddings nor pipeline stages are supported")
        hidden_states = self.model(input_ids, positions, None)
        is_code_next = (input_ids >= self.shape.text_vocab_size) | (input_ids == self.begin_of_image_id)
        return torch.cat([hidden_states, is_code_next[:, None].to(hidden_states.dtype)], dim=1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[N, hidden + 1] -> logits [N, text ids + codes]; None on ranks that gather none."""
        is_code_next = hidden_states[:, -1] > 0.5
        rows = hidden_states[:, :-1].contiguous()
        num_codes_next = int(is_code_next.sum())
        if num_codes_next == len(rows):
            return self._widen(None, self.gen_head(rows))
        if num_codes_next == 0:
            return self._widen(self.logits_processor(self.lm_head, rows), None)
        code_rows, text_rows = is_code_next.nonzero()[:, 0], (~is_code_next).nonzero()[:, 0]
        code_logits = self._widen(None, self.gen_head(rows[code_rows]))
        text_logits = self._widen(self.logits_processor(self.lm_head, rows[text_rows]), None)
        if code_logits is None or text_logits is None:
            return None
        out = code_logits.new_empty(len(rows), self.shape.vocab_size)
        out[code_rows], out[text_rows] = code_logits, text_logits
        return out

    def _widen(self, text: Tensor | None, codes: Tensor | None) -> Tensor | None:
        """Logits of one vocabulary with -inf for the other; None stays None."""
        if text is not None:
            return F.pad(text, (0, self.shape.num_codes), value=-torch.inf)
        if codes is not None:
            return F.pad(codes, (self.shape.text_vocab_size, 0), value=-torch.inf)
        return None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Either published layout. Raises ValueError that names each tensor that is missing, misshapen or not known."""
        tensors = language_tensors(self.shape)
        published = {tensor.name: tensor.shape for tensor in tensors.values()}
        return load_checked(
            self,
            AutoWeightsLoader(self).load_weights,
            ((name, tensor) for name, tensor in weights if is_known(name)),
            {name: tensor.shape for name, tensor in tensors.items()},
            rule_of(self.config.to_dict()),
            own_name=own_name,
            published=lambda *_: published,
            unused=(*unused_names(self.shape), vq_prefix(self.shape)),  # `JanusVQ` reads the latter
        )
