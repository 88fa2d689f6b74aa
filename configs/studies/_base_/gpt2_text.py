"""The small GPT-2 style decoder of projects/language_model, on the built-in text whatever text the environment names."""

_base_ = "../../../projects/language_model/configs/gpt2.py"

builtin = dict(dataset=dict(path="pydoc_data.topics"))
train_dataloader = builtin
val_dataloader = builtin
test_dataloader = builtin
