"""Plain sampling of the demo model through Transformers: one token a step, no speculation.

This is the reference that the evaluation uses; it knows nothing of vLLM.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sjd_vllm.demo import tokens


@torch.inference_mode()
def sample_codes(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    captions: list[str],
    guidance_scale: float,
    temperature: float = 1.0,
    top_k: int = 100,
    seed: int = 0,
) -> np.ndarray:
    """Draw one picture per caption.

    Args:
        model: the decoder.
        tokenizer: of the same checkpoint.
        captions: N captions.
        guidance_scale: s in `uncond_logits + s * (cond_logits - uncond_logits)`; at 1 the unconditional half is
            not run.
        temperature: divides the guided logits.
        top_k: codes kept, by guided logit.
        seed: of the draws.

    Returns:
        int64 [N, 16, 16].
    """
    generator = torch.Generator().manual_seed(seed)
    is_guided = guidance_scale != 1.0
    prompts = tokenizer([*captions, *[""] * len(captions)] if is_guided else captions)["input_ids"]
    longest = max(map(len, prompts))
    # Prompts end together; what stands before them is masked, and positions count from <bos>.
    inputs = torch.tensor([[tokens.PAD_ID] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = inputs != tokens.PAD_ID
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    generated = []
    for step in range(tokens.NUM_GENERATED - 1):  # the last token is always <eoi>
        output = model(
            input_ids=inputs,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        if step % (tokens.GRID + 1) == tokens.GRID:
            chosen = torch.full((len(captions),), tokens.EOL_ID)
        else:
            logits = output.logits[:, -1, tokens.IMAGE_START :].float()
            if is_guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + guidance_scale * (conditional - unconditional)
            chosen = tokens.IMAGE_START + _draw(logits / temperature, top_k, generator)
        generated.append(chosen)
        inputs = (torch.cat([chosen, chosen]) if is_guided else chosen)[:, None]
        mask = torch.cat([mask, torch.ones_like(inputs, dtype=torch.bool)], 1)
        positions = positions[:, -1:] + 1
    generated.append(torch.full((len(captions),), tokens.EOI_ID))
    return tokens.codes_of(torch.stack(generated, 1).numpy())


def _draw(logits: Tensor, top_k: int, generator: torch.Generator) -> Tensor:
    """Sample from the top k of logits [N, K]: int64 [N]."""
    kept, indices = logits.topk(min(top_k, logits.shape[1]), dim=1)
    place = torch.multinomial(kept.softmax(1), 1, generator=generator)
    return indices.gather(1, place)[:, 0]
