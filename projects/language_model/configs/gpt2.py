"""A small GPT-2 style decoder on bytes, with preconditioned attention: it predicts each byte from those before it."""

_base_ = "_base_/text.py"

model = dict(
    type="ByteModel",
    network=dict(
        type="Conditioned",
        conditioning="pc",
        module=dict(
            type="GPT2Decoder",
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_positions=256,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own function, by PyTorch's faster operation
            attn_pdrop=0.0,  # attention without dropout is faster
        ),
    ),
)
pipeline = [dict(type="NextByte")]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = dict(dataset=dict(pipeline=pipeline))
val_evaluator = dict(type="ByteLoss", prefix="next_byte")
test_evaluator = val_evaluator
