"""Mask2Former, Swin-T, preconditioned attention in backbone, pixel decoder and decoder, ADE20K 160k, 512 x 512.

Reference: mmseg's mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py. The base is given by its path, because
`mmseg::` fails with the maintained fork, whose distribution is not named mmsegmentation.
"""

_base_ = __import__("mmseg").__path__[0] + "/.mim/configs/mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py"
custom_imports = dict(imports=["condattn.registry"], allow_failed_imports=False)
model = dict(type="Conditioned", module="EncoderDecoder", conditioning="pc")
