"""Trains the decoder: a small Llama that continues a caption with the codes of a picture."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sjd_vllm.demo import parallel, tokens
from sjd_vllm.demo.captions import Scene, describe
from sjd_vllm.demo.loop import run_steps, set_learning_rate
from sjd_vllm.demo.pool import IndexStream

_OBJECT_ROWS = range(6, 13)


@dataclass(frozen=True)
class DecoderTrainingConfig:
    """How the decoder is trained.

    Attributes:
        num_steps: steps; the learning rate is constant, then falls linearly to 0.
        decay_share: share of the steps in which it falls.
        batch_size: pictures per step.
        matrix_learning_rate: of Muon, for the matrices of the layers.
        other_learning_rate: of AdamW, for embeddings, norms and the output layer.
        caption_dropout: share of pictures trained with the unconditional prompt.
        word_dropout: chance of a word to become `<unk>`, so that unknown words do little harm.
        short_caption_share: share of captions that leave parts unsaid.
        omit_probability: chance of each part of such a caption to be left unsaid.
        object_row_weight: weight in the loss of the rows in which objects stand, relative to the others: where the
            object is said to be takes longest to learn. A weight that depends on the row alone leaves the best
            prediction what it was.
        column_loss_weight: of the auxiliary loss, see `DecoderInTraining`.
        average_decay: of the moving average of the weights, per step; the average is what is exported.
    """

    num_steps: int = 6000
    decay_share: float = 0.25
    batch_size: int = 16
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 3e-3
    caption_dropout: float = 0.12
    word_dropout: float = 0.02
    short_caption_share: float = 0.1
    omit_probability: float = 0.35
    object_row_weight: float = 3.0
    column_loss_weight: float = 0.3
    average_decay: float = 0.995
    seed: int = 2


@dataclass(frozen=True)
class DecoderSize:
    """Size of the decoder.

    Attributes:
        hidden_size: width, a multiple of 64, which is the width of a head.
        num_layers: depth.
        intermediate_size: width of the feed-forward layers.
    """

    hidden_size: int = 192
    num_layers: int = 4
    intermediate_size: int = 512


def llama_config(size: DecoderSize) -> LlamaConfig:
    """The configuration that Transformers and vLLM read."""
    return LlamaConfig(
        vocab_size=tokens.VOCAB_SIZE,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // 64,
        num_key_value_heads=size.hidden_size // 64,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokens.PAD_ID,
        bos_token_id=tokens.BOS_ID,
        eos_token_id=tokens.EOI_ID,
    )


def train_decoder(
    codes: np.ndarray, labels: np.ndarray, folder: Path, config: DecoderTrainingConfig, size: DecoderSize
) -> LlamaForCausalLM:
    """Train on codes uint16 [N, 16, 16] with labels int64 [N, 7]; state is kept in `folder`.

    Returns the model with averaged weights. Inside `parallel.run_workers` each process takes its share of every batch.
    """
    torch.manual_seed(config.seed)
    model = DecoderInTraining(LlamaForCausalLM(llama_config(size)))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    is_matrix = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in is_matrix]
    matrix_optimizer = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01)
    other_optimizer = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.average_decay))
    tokenizer = tokens.build_tokenizer()
    # The passes run on a bfloat16 copy, the updates on the float32 weights.
    working_model = copy.deepcopy(model).bfloat16()
    token_weights = row_weights(config.object_row_weight)
    index_stream = IndexStream(len(codes), config.batch_size, config.seed)

    def step_fn(step: int) -> dict[str, float]:
        chosen = index_stream.at(step)[parallel.rank() :: parallel.num_workers()]
        rng = np.random.default_rng([config.seed, step, parallel.rank()])
        prompts = training_prompts(labels[chosen], tokenizer, config, rng)
        rate = trapezoid(step, config.num_steps, config.decay_share)
        set_learning_rate(matrix_optimizer, rate * config.matrix_learning_rate)
        set_learning_rate(other_optimizer, rate * config.other_learning_rate)
        working_model.load_state_dict(model.state_dict())
        working_model.zero_grad()
        losses, column_loss = working_model(prompts, tokens.image_ids(codes[chosen]))
        ((losses * token_weights).mean() + config.column_loss_weight * column_loss).backward()
        for parameter, working in zip(model.parameters(), working_model.parameters(), strict=True):
            parameter.grad = working.grad.float()
        parallel.average_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        matrix_optimizer.step()
        other_optimizer.step()
        average.update_parameters(model)
        return {"nats": float(losses.detach().mean()), "column": float(column_loss.detach())}

    parts = {
        "model": model,
        "average": average,
        "matrix_optimizer": matrix_optimizer,
        "other_optimizer": other_optimizer,
    }
    run_steps("decoder", folder / "decoder.pt", config.num_steps, parts, step_fn)
    return average.module.llama


def training_prompts(
    labels: np.ndarray, tokenizer: PreTrainedTokenizerFast, config: DecoderTrainingConfig, rng: np.random.Generator
) -> list[list[int]]:
    """A fresh prompt for each row of labels [B, 7], with the dropouts of the configuration."""
    captions = []
    for row in labels:
        is_short = rng.random() < config.short_caption_share
        caption = describe(Scene.from_labels(row), rng, config.omit_probability if is_short else 0.0)
        words = [tokenizer.unk_token if rng.random() < config.word_dropout else word for word in caption.split()]
        captions.append("" if rng.random() < config.caption_dropout else " ".join(words))
    return tokenizer(captions)["input_ids"]


class DecoderInTraining(nn.Module):
    """The decoder with a head on its middle layer that tells in which column the next token will stand.

    Where a sun or a house belongs is a match of a word with a column. The likelihood alone teaches the column slowly,
    since few tokens depend on it; the head has every token teach it. It is not exported.
    """

    def __init__(self, llama: LlamaForCausalLM) -> None:
        super().__init__()
        self.llama = llama
        self.column_head = nn.Linear(llama.config.hidden_size, tokens.GRID + 1)

    def forward(self, prompts: list[list[int]], images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Losses in nats: of each token, float32 [B, 273], and of the columns, a scalar; see `token_losses`."""
        hidden_states = image_hidden_states(self.llama, prompts, images)
        middle, last = hidden_states[len(hidden_states) // 2], hidden_states[-1]
        columns = (torch.arange(tokens.NUM_GENERATED) % (tokens.GRID + 1)).expand(len(prompts), -1)
        column_loss = F.cross_entropy(self.column_head(middle).float().mT, columns)
        return _cross_entropy(self.llama, last, images), column_loss


def token_losses(model: LlamaForCausalLM, prompts: list[list[int]], images: np.ndarray) -> Tensor:
    """Cross-entropy in nats of each token after `<boi>`: float32 [B, 273].

    Args:
        model: the decoder.
        prompts: B prompts, each ending with `<boi>`.
        images: int64 [B, 273], see `tokens.image_ids`.
    """
    return _cross_entropy(model, image_hidden_states(model, prompts, images)[-1], images)


def image_hidden_states(model: LlamaForCausalLM, prompts: list[list[int]], images: np.ndarray) -> list[Tensor]:
    """Hidden states that predict the 273 tokens after `<boi>`: [B, 273, hidden], embeddings first, last layer last."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    inputs = torch.full((len(prompts), int(lengths.max()) + tokens.NUM_GENERATED - 1), tokens.PAD_ID)
    for row, prompt, image in zip(inputs, prompts, images, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
        row[len(prompt) : len(prompt) + tokens.NUM_GENERATED - 1] = torch.from_numpy(image[:-1])
    # Position t predicts the token at t + 1: the first prediction is at `<boi>`. Padding lies behind, unseen.
    positions = lengths[:, None] - 1 + torch.arange(tokens.NUM_GENERATED)
    rows = torch.arange(len(prompts))[:, None]
    output = model.model(input_ids=inputs, use_cache=False, output_hidden_states=True)
    return [hidden[rows, positions] for hidden in output.hidden_states]


def _cross_entropy(model: LlamaForCausalLM, last_hidden: Tensor, images: np.ndarray) -> Tensor:
    return F.cross_entropy(model.lm_head(last_hidden).float().mT, torch.from_numpy(images), reduction="none")


def row_weights(object_row_weight: float) -> Tensor:
    """Weight of each of the 273 tokens in the loss; the mean is 1."""
    weights = torch.ones(tokens.NUM_GENERATED)
    columns = tokens.GRID + 1
    weights[_OBJECT_ROWS.start * columns : _OBJECT_ROWS.stop * columns] = object_row_weight
    return weights / weights.mean()


def trapezoid(step: int, num_steps: int, decay_share: float, num_warmup_steps: int = 60) -> float:
    """Factor on the learning rate: linear rise, plateau, linear fall to 0."""
    return min(1.0, (step + 1) / num_warmup_steps, (num_steps - step) / (decay_share * num_steps))
