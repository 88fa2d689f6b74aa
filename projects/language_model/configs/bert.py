"""A small BERT style encoder on bytes, with preconditioned attention: it recovers masked bytes from all others."""

_base_ = "_base_/text.py"

model = dict(
    type="ByteModel",
    network=dict(
        type="Conditioned",
        conditioning="pc",
        module=dict(
            type="BertEncoder",
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=256,
            attention_probs_dropout_prob=0.0,  # attention without dropout is faster
        ),
    ),
)
train_dataloader = dict(dataset=dict(pipeline=[dict(type="MaskedBytes")]))
fixed = [dict(type="MaskedBytes", fixed=True)]
val_dataloader = dict(dataset=dict(pipeline=fixed))
test_dataloader = dict(dataset=dict(pipeline=fixed))
val_evaluator = dict(type="ByteLoss", prefix="masked_byte")
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=1e-3))
