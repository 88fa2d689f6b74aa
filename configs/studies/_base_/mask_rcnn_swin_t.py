"""Sizes of a study of Mask R-CNN: the small Swin of its configuration, and Swin-T for a GPU."""

sizes = dict(
    cpu={},
    gpu={
        "model.backbone.embed_dims": 96,
        "model.backbone.depths": (2, 2, 6, 2),
        "model.backbone.num_heads": (3, 6, 12, 24),
        "model.backbone.strides": (4, 2, 2, 2),
        "model.backbone.out_indices": (0, 1, 2, 3),
        "model.neck.in_channels": [96, 192, 384, 768],
        "model.neck.num_outs": 4,
        "model.rpn_head.anchor_generator.strides": [4, 8, 16, 32],
        "model.roi_head.bbox_roi_extractor.featmap_strides": [4, 8, 16, 32],
        "model.roi_head.mask_roi_extractor.featmap_strides": [4, 8, 16, 32],
    },
)
