"""Hugging Face's Nystromformer as a registered encoder, and a classifier of sequences on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn import functional
from transformers import NystromformerConfig, NystromformerModel

from condattn.openmmlab.errors import UserError

from .datasets.base import PADDING


@MODELS.register_module()
def Nystromformer(length: int, num_landmarks: int, **settings: Any) -> NystromformerModel:
    """Hugging Face's Nystromformer for sequences of one length, shorter ones being padded to it.

    Padding does not count as a key of the landmarks. It does take part in the means that are the landmarks, and in the
    convolution of the values: that is how Hugging Face's model computes them, conditioned or not.

    Args:
        length: Number of tokens of every sequence, padding included.
        num_landmarks: Number of landmarks; equal to ``length``, attention is exact.
        **settings: Of ``transformers.NystromformerConfig``, such as ``vocab_size`` and ``hidden_size``.

    Raises:
        ValueError: If ``length`` is not a multiple of ``num_landmarks``.
    """
    if num_landmarks < 1 or length % num_landmarks:
        raise ValueError(
            f"Nystromformer: expected a length that is a multiple of num_landmarks, got {length} and {num_landmarks}"
        )
    positions = dict(max_position_embeddings=length, segment_means_seq_len=length, num_landmarks=num_landmarks)
    return NystromformerModel(NystromformerConfig(**positions, type_vocab_size=1, pad_token_id=PADDING, **settings))


@MODELS.register_module()
class SequenceClassifier(BaseModel):
    """Classify sequences, or pairs of them, by the mean of their encoded tokens.

    Each sequence is encoded, and the mean of its tokens, padding left out, is its vector. Vectors a and b of a pair,
    from one encoder, are joined to (a, b, a * b, a - b). A hidden layer with ReLU and a linear layer give the scores.

    Args:
        encoder: Config of the encoder: a :func:`Nystromformer`, or ``Conditioned`` around it.
        num_classes: Number of classes.
        hidden_channels: Width of the hidden layer.
        pairs: Whether samples are pairs of sequences.
        data_preprocessor: As of mmengine's ``BaseModel``.
        init_cfg: As of mmengine's ``BaseModel``.

    Source:
        The head, and the one for pairs, are those of the Nystromformer authors' Long Range Arena.
    """

    def __init__(
        self,
        encoder: Mapping[str, Any],
        num_classes: int,
        hidden_channels: int,
        pairs: bool = False,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.encoder = MODELS.build(encoder)
        self.sequences = 2 if pairs else 1
        channels = self.encoder.config.hidden_size * (4 if pairs else 1)
        self.head = nn.Sequential(
            nn.Linear(channels, hidden_channels), nn.ReLU(), nn.Linear(hidden_channels, num_classes)
        )

    def forward(
        self, inputs: Tensor, data_samples: Sequence[BaseDataElement] | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | Sequence[BaseDataElement]:
        """Classify a batch.

        Args:
            inputs: Numbers of tokens, (batch, 1 or 2 sequences, length); 0 is padding.
            data_samples: One for each sample; ``gt_label`` is read for the loss, ``pred_label`` is set by predictions.
            mode: 'tensor', 'loss' or 'predict'.

        Returns:
            'tensor': scores (batch, classes); 'loss': the cross entropy, as ``loss``; 'predict': ``data_samples``.

        Raises:
            UserError: If there are more or fewer tokens, or sequences, than the model is for, or, on a CPU, tokens with
                larger numbers.
            ValueError: If there is no such mode.
        """
        scores = self.head(self._vectors(inputs))
        if mode == "tensor":
            return scores
        if mode == "loss":
            labels = torch.stack([sample.gt_label for sample in data_samples])
            return dict(loss=functional.cross_entropy(scores, labels))
        if mode == "predict":
            for sample, label in zip(data_samples, scores.argmax(-1), strict=True):
                sample.set_data(dict(pred_label=label))
            return data_samples
        raise ValueError(f"mode: expected 'tensor', 'loss' or 'predict', got {mode!r}")

    def _vectors(self, inputs: Tensor) -> Tensor:
        """What the head gets, (batch, channels)."""
        length, size = self.encoder.config.segment_means_seq_len, self.encoder.config.vocab_size
        if inputs.shape[1:] != (self.sequences, length):
            raise UserError(
                f"expected {self.sequences} sequences of {length} tokens in each sample, which the model is for, got "
                f"{inputs.shape[1]} of {inputs.shape[2]}; give data sets and model the same length"
            )
        tokens = inputs.flatten(0, 1)
        mask = tokens != PADDING
        try:
            encoded = self.encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        except IndexError as error:
            raise UserError(
                f"the data have tokens with numbers up to {tokens.max()}, and the encoder is for {size} numbers, from "
                "0 on; set model.encoder.module.vocab_size"
            ) from error
        means = (encoded * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        first, *others = means.unflatten(0, (-1, self.sequences)).unbind(1)
        for second in others:
            return torch.cat([first, second, first * second, first - second], dim=-1)
        return first
