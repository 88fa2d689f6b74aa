"""The small GPT-2 style decoder of projects/language_model, on its built-in text whatever text is set."""

_base_ = "../../../projects/language_model/configs/gpt2.py"

builtin = dict(dataset=dict(path="pydoc_data.topics"))
train_dataloader = builtin
val_dataloader = builtin
test_dataloader = builtin
