"""Hugging Face transformers' networks for bytes, and the model that mmengine trains."""

from typing import Any

import numpy as np
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel

from condattn.openmmlab.errors import UserError

from .tokens import BEGIN, UNSCORED, VOCABULARY


@MODELS.register_module()
def GPT2Decoder(**settings: Any) -> GPT2LMHeadModel:
    """GPT-2 (Radford et al., 2019) on bytes, with random weights.

    Args:
        **settings: Of transformers' ``GPT2Config``, such as ``n_embd``, ``n_layer``, ``n_head`` and ``n_positions``.

    Raises:
        ValueError: If a setting is unknown, or the settings contradict each other.
    """
    special = dict(bos_token_id=BEGIN, eos_token_id=BEGIN)
    return GPT2LMHeadModel(_configuration(GPT2Config, settings, use_cache=False, **special))


@MODELS.register_module()
def BertEncoder(**settings: Any) -> BertForMaskedLM:
    """BERT (arXiv 1810.04805) on bytes, with its head for masked tokens and random weights.

    Args:
        **settings: Of transformers' ``BertConfig``, such as ``hidden_size``, ``intermediate_size``,
            ``num_hidden_layers``, ``num_attention_heads`` and ``max_position_embeddings``.

    Raises:
        ValueError: If a setting is unknown, or the settings contradict each other.
    """
    return BertForMaskedLM(_configuration(BertConfig, settings, pad_token_id=None))


def _configuration(kind: type[PretrainedConfig], settings: dict[str, Any], **fixed: Any) -> PretrainedConfig:
    """The configuration with ``settings``, of which transformers itself would accept unknown ones."""
    fixed["vocab_size"] = VOCABULARY
    known = kind().to_dict().keys() | kind.attribute_map.keys() | {"attn_implementation"}
    for name in settings:
        if name not in known:
            raise ValueError(
                f"{kind.__name__} has no setting {name!r}; its settings are in transformers' documentation"
            )
        if name in fixed:
            raise ValueError(f"{name} is given by the bytes, and cannot be set")
    return kind(**settings, **fixed)


@MODELS.register_module()
class ByteModel(BaseModel):
    """Predict bytes with a network that returns ``logits``.

    Args:
        network: Config of a transformers model that takes tokens (N, length) and returns logits (N, length, tokens),
            possibly inside ``type='Conditioned'``.
        data_preprocessor: As of mmengine's ``BaseModel``.
        init_cfg: As of mmengine's ``BaseModel``.
    """

    def __init__(self, network: dict, data_preprocessor: dict | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.network: PreTrainedModel = MODELS.build(network)

    def forward(self, inputs: Tensor, data_samples: Tensor | None = None, mode: str = "tensor") -> Any:
        """Run the network.

        Args:
            inputs: Tokens (N, length) of int64.
            data_samples: The bytes to predict, (N, length) of int64, ``UNSCORED`` where none is to be predicted; not
                needed with the mode 'tensor'.
            mode: 'tensor', 'loss' or 'predict'.

        Returns:
            'tensor': logits (N, length, ``VOCABULARY``). 'loss': ``loss``, the mean cross entropy of the predicted
            bytes, in nats. 'predict': for each sequence a dictionary with ``nats``, the sum of the cross entropies of
            its predicted bytes, ``correct``, the number of those that have the largest logit, and ``bytes``, of uint8,
            those that were to be predicted.

        Raises:
            UserError: If the sequences are longer than the network's positions.
        """
        positions = self.network.config.max_position_embeddings
        if inputs.shape[1] > positions:
            raise UserError(
                f"the sequences have {inputs.shape[1]} tokens, and the network has {positions} positions; use a "
                "smaller length (train_dataloader.dataset.length, and those of the val and test_dataloader), or more "
                "positions (n_positions of GPT-2, max_position_embeddings of BERT, in model.network.module)"
            )
        logits = self.network(inputs).logits
        if mode == "tensor":
            return logits
        if mode == "loss":
            return dict(
                loss=F.cross_entropy(logits.flatten(0, 1).float(), data_samples.flatten(), ignore_index=UNSCORED)
            )
        nats = F.cross_entropy(
            logits.flatten(0, 1).float(), data_samples.flatten(), ignore_index=UNSCORED, reduction="none"
        )
        correct = logits.argmax(-1) == data_samples
        return [
            dict(
                nats=one.double().sum().item(),
                correct=int(hits.sum()),
                bytes=targets[targets != UNSCORED].cpu().numpy().astype(np.uint8),
            )
            for one, hits, targets in zip(nats.view_as(data_samples), correct, data_samples, strict=True)
        ]
