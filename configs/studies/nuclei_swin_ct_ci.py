"""Mask R-CNN with a small Swin on nuclei: do conditioned tokens and conditioned initialisation help?"""

_base_ = "nuclei_swin.py"
title = "Do conditioned tokens or conditioned initialisation help Mask R-CNN with a small Swin to segment nuclei?"

key = "model.backbone.conditioning"
variants = {"_delete_": True, "none": {key: "none"}, "ct": {key: "ct"}, "ci": {key: "ci"}}
del key
families = dict(_delete_=True, methods=[("ct", "none"), ("ci", "none")])
