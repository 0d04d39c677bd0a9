"""One small member of every family of torchvision and timm, with random weights and small images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.detection import FCOS, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.resnet import (
    BasicBlock,
    BasicStem,
    Conv2Plus1D,
    Conv3DNoTemporal,
    Conv3DSimple,
    R2Plus1dStem,
    VideoResNet,
)
from torchvision.models.video.swin_transformer import SwinTransformer3d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.whole_models import NUM_CLASSES
from captum_classfilters import ClassScores

_SLOW_START = {"googlenet", "inception_v3", "vgg11"}  # their own initialization takes long


@dataclass(frozen=True)
class Member:
    """A model by its name, options that make it small, and the images that it takes."""

    kind: str
    name: str
    size: tuple[int, ...] = (64,)
    options: dict[str, Any] = field(default_factory=dict)
    number: int = 4  # images: PyTorch's gradient of a batch normalization of one image may be wrong
    maker: Callable[..., nn.Module] | None = None

    def build(self, **more: Any) -> nn.Module:
        """The model; `more` options replace its own."""
        options = {**self.options, **more}
        if self.maker is not None:
            return self.maker(**options)
        if self.kind == TIMM:
            import timm

            model: nn.Module = timm.create_model(
                self.name, pretrained=False, num_classes=NUM_CLASSES, **options
            )
            return model
        return _from_torchvision(self.kind, self.name, options)


# -- torchvision ------------------------------------------------------------------------------------


def _from_torchvision(kind: str, name: str, options: dict[str, Any]) -> nn.Module:
    if name in _SLOW_START:
        options = {**options, "init_weights": False}
    if kind in (SEGMENTATION, DETECTION):
        options = {**options, "weights_backbone": None}
    make = torchvision.models.get_model
    model: nn.Module = make(name, weights=None, num_classes=NUM_CLASSES, **options)
    if kind == SEGMENTATION:
        return ClassScores(model, mean_over_pixels)
    return ClassScores(model, best_boxes) if kind == DETECTION else model


def mean_over_pixels(output: dict[str, Tensor]) -> Tensor:
    """A class's score in a segmentation."""
    return output["out"].mean((2, 3))


def best_boxes(output: list[dict[str, Tensor]]) -> Tensor:
    """A class's score in a detection: that of its best box."""
    rows = [
        boxes["scores"]
        .new_zeros(NUM_CLASSES)
        .scatter_reduce(0, boxes["labels"], boxes["scores"], "amax")
        for boxes in output
    ]
    return torch.stack(rows)


def _vit(**options: Any) -> nn.Module:
    sizes = {"image_size": options.get("img_size", 32), "patch_size": 8, "hidden_dim": 24}
    return torchvision.models.VisionTransformer(
        **sizes, num_layers=2, num_heads=2, mlp_dim=48, num_classes=NUM_CLASSES
    )


def _maxvit(**options: Any) -> nn.Module:
    size = options.get("img_size", 64)
    return MaxVit(
        input_size=(size, size),
        stem_channels=12,
        partition_size=2,
        block_channels=[12, 20],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=NUM_CLASSES,
    )


def _swin(**options: Any) -> nn.Module:
    sizes = {"patch_size": [4, 4], "window_size": [4, 4], "mlp_ratio": 2.0}
    return torchvision.models.SwinTransformer(
        **sizes, embed_dim=24, depths=[1, 2], num_heads=[2, 4], num_classes=NUM_CLASSES, **options
    )


def _swin_3d(**options: Any) -> nn.Module:
    sizes = {"patch_size": [2, 4, 4], "window_size": [2, 4, 4], "mlp_ratio": 2.0}
    return SwinTransformer3d(
        **sizes, embed_dim=24, depths=[1, 2], num_heads=[2, 4], num_classes=NUM_CLASSES
    )


def _convnext(**options: Any) -> nn.Module:
    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 2), CNBlockConfig(48, None, 1)]
    return torchvision.models.ConvNeXt(blocks, num_classes=NUM_CLASSES)


def _efficientnet_v2(**options: Any) -> nn.Module:
    blocks = [
        FusedMBConvConfig(1, 3, 1, 16, 16, 1),
        FusedMBConvConfig(4, 3, 2, 16, 24, 2),
        MBConvConfig(4, 3, 2, 24, 32, 2),
    ]
    return torchvision.models.EfficientNet(
        blocks,
        0.2,
        last_channel=96,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        num_classes=NUM_CLASSES,
    )


def _video_resnet(*convolutions: Any, **options: Any) -> nn.Module:
    stem = R2Plus1dStem if convolutions[0] is Conv2Plus1D else BasicStem
    return VideoResNet(BasicBlock, convolutions, [1, 1, 1, 1], stem, num_classes=NUM_CLASSES)


def _fcn(**options: Any) -> nn.Module:
    backbone = IntermediateLayerGetter(torchvision.models.resnet18(), {"layer4": "out"})
    return ClassScores(FCN(backbone, FCNHead(512, NUM_CLASSES), None), mean_over_pixels)


def _on_pyramid(detector: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A detector on the maps of a small residual network."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **options)
    if detector in (FCOS, RetinaNet):
        sizes: dict[str, Any] = _ONE_STAGE
        anchors = AnchorGenerator(tuple((16 * 2**at,) for at in range(5)), ((1.0,),) * 5)
        sizes = {**sizes, "anchor_generator": anchors}
    else:
        sizes = _TWO_STAGES
    if detector is KeypointRCNN:
        sizes = {**sizes, "num_keypoints": 3}
    return ClassScores(detector(backbone, num_classes=NUM_CLASSES, **sizes), best_boxes)


def _s3d(**options: Any) -> nn.Module:
    model = torchvision.models.video.s3d(num_classes=NUM_CLASSES)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own wants 16 images of 224 pixels
    return model


def _mvit(**options: Any) -> nn.Module:
    shapes = ((1, 24, 24, 1, 4), (2, 24, 48, 2, 2), (2, 48, 48, 1, 2))
    blocks = [
        MSBlockConfig(
            num_heads=heads,
            input_channels=before,
            output_channels=after,
            kernel_q=[3, 3, 3],
            kernel_kv=[3, 3, 3],
            stride_q=[1, stride, stride],
            stride_kv=[1, step, step],
        )
        for heads, before, after, stride, step in shapes
    ]
    return MViT((32, 32), 8, blocks, num_classes=NUM_CLASSES, **options)


CLASSIFIERS, VIDEO = "torchvision: classification", "torchvision: video"
SEGMENTATION, DETECTION = "torchvision: segmentation", "torchvision: detection"
_SMALL = {"min_size": 96, "max_size": 96}
_FEW_BOXES = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20}
_TWO_STAGES = {**_SMALL, **_FEW_BOXES, "box_detections_per_img": 4}
_ONE_STAGE = {**_SMALL, "score_thresh": 0.0, "detections_per_img": 10}
TORCHVISION = [
    Member(CLASSIFIERS, "alexnet", (96,)),
    Member(CLASSIFIERS, "vgg11"),
    Member(CLASSIFIERS, "resnet18"),
    Member(CLASSIFIERS, "resnext50_32x4d"),
    Member(CLASSIFIERS, "densenet121"),
    Member(CLASSIFIERS, "inception_v3", (107,)),
    Member(CLASSIFIERS, "googlenet"),
    Member(CLASSIFIERS, "squeezenet1_1"),
    Member(CLASSIFIERS, "mobilenet_v2"),
    Member(CLASSIFIERS, "mobilenet_v3_small"),
    Member(CLASSIFIERS, "shufflenet_v2_x0_5"),
    Member(CLASSIFIERS, "mnasnet0_5"),
    Member(CLASSIFIERS, "efficientnet_b0"),
    Member(CLASSIFIERS, "small EfficientNetV2", maker=_efficientnet_v2),
    Member(CLASSIFIERS, "regnet_x_400mf"),
    Member(CLASSIFIERS, "regnet_y_400mf"),
    Member(CLASSIFIERS, "small ConvNeXt", maker=_convnext),
    Member(CLASSIFIERS, "small VisionTransformer", (32,), maker=_vit),
    Member(CLASSIFIERS, "small Swin", maker=_swin),
    Member(
        CLASSIFIERS,
        "small Swin v2",
        options={"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2},
        maker=_swin,
    ),
    Member(CLASSIFIERS, "small MaxVit", maker=_maxvit),
    Member(VIDEO, "small R3D", (4, 32, 32), maker=partial(_video_resnet, *[Conv3DSimple] * 4)),
    Member(
        VIDEO,
        "small MC3",
        (4, 32, 32),
        maker=partial(_video_resnet, Conv3DSimple, *[Conv3DNoTemporal] * 3),
    ),
    Member(VIDEO, "small R(2+1)D", (4, 32, 32), maker=partial(_video_resnet, *[Conv2Plus1D] * 4)),
    Member(VIDEO, "s3d", (16, 64, 64), maker=_s3d),
    Member(
        VIDEO,
        "small MViT",
        (8, 32, 32),
        {
            "residual_pool": False,
            "residual_with_cls_embed": True,
            "rel_pos_embed": False,
            "proj_after_attn": False,
        },
        maker=_mvit,
    ),
    Member(
        VIDEO,
        "small MViT v2",
        (8, 32, 32),
        {
            "residual_pool": True,
            "residual_with_cls_embed": False,
            "rel_pos_embed": True,
            "proj_after_attn": True,
        },
        maker=_mvit,
    ),
    Member(VIDEO, "small Swin3D", (4, 32, 32), maker=_swin_3d),
    Member(SEGMENTATION, "small FCN", maker=_fcn),
    Member(SEGMENTATION, "deeplabv3_mobilenet_v3_large"),
    Member(SEGMENTATION, "lraspp_mobilenet_v3_large"),
    Member(DETECTION, "fasterrcnn_mobilenet_v3_large_320_fpn", (96,), _TWO_STAGES),
    Member(DETECTION, "small Mask R-CNN", (96,), maker=partial(_on_pyramid, MaskRCNN)),
    Member(DETECTION, "small Keypoint R-CNN", (96,), maker=partial(_on_pyramid, KeypointRCNN)),
    Member(
        DETECTION,
        "small FCOS",
        (96,),
        maker=partial(
            _on_pyramid, FCOS, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
        ),
    ),
    Member(
        DETECTION,
        "small RetinaNet",
        (96,),
        maker=partial(
            _on_pyramid, RetinaNet, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
        ),
    ),
    Member(DETECTION, "ssdlite320_mobilenet_v3_large", (96,), {"detections_per_img": 10}),
    Member(DETECTION, "ssd300_vgg16", (96,), {"detections_per_img": 10}, 2),
]

# -- timm -------------------------------------------------------------------------------------------

TIMM = "timm"
_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 4}
TIMM_MEMBERS = [
    Member(TIMM, "beit_base_patch16_224", options={"img_size": 64, **_VIT}),
    Member(TIMM, "botnet26t_256", options={"img_size": 64}),
    Member(TIMM, "cait_xxs24_224", options={"img_size": 64}),
    Member(TIMM, "coat_tiny", options={"img_size": 64}),
    Member(TIMM, "convit_tiny", options={"img_size": 64}),
    Member(TIMM, "convmixer_768_32"),
    Member(TIMM, "convnext_atto_rms"),
    Member(TIMM, "cpubone_nano"),
    Member(TIMM, "crossvit_tiny_240"),
    Member(TIMM, "cs3darknet_focus_s"),
    Member(TIMM, "csatv2"),
    Member(TIMM, "cspnext_tiny"),
    Member(TIMM, "davit_tiny", options={"depths": (1, 1, 1, 1)}),
    Member(TIMM, "deepseek_vit_412m", (56,), {"img_size": 56, **_VIT}),
    Member(TIMM, "deit_tiny_patch16_224", options={"img_size": 64}),
    Member(TIMM, "densenetblur121d"),
    Member(TIMM, "dla46x_c"),
    Member(TIMM, "dpn48b"),
    Member(TIMM, "edgenext_xx_small"),
    Member(TIMM, "efficientformer_l1", (224,)),
    Member(TIMM, "efficientformerv2_s0", options={"img_size": 64}),
    Member(TIMM, "efficientvim_m1"),
    Member(TIMM, "efficientvit_b0"),
    Member(TIMM, "efficientvit_m0", options={"img_size": 64}),
    Member(TIMM, "ese_vovnet19b_slim_dw"),
    Member(TIMM, "fasternet_t0"),
    Member(TIMM, "fastvit_t8"),
    Member(TIMM, "focalnet_tiny_srf"),
    Member(TIMM, "gcvit_xxtiny", options={"img_size": 64}),
    Member(TIMM, "ghostnet_050"),
    Member(TIMM, "gmlp_ti16_224", options={"img_size": 64}),
    Member(TIMM, "hardcorenas_b"),
    Member(TIMM, "hgnetv2_b0"),
    Member(TIMM, "hiera_tiny_224", options={"img_size": 64}),
    Member(TIMM, "hrnet_w18_small"),
    Member(TIMM, "iformer_t"),
    Member(TIMM, "inception_next_atto"),
    Member(TIMM, "inception_resnet_v2", (96,)),
    Member(TIMM, "inception_v3.tf_adv_in1k", (96,)),
    Member(TIMM, "inception_v4", (96,)),
    Member(TIMM, "lambda_resnet26t"),
    Member(TIMM, "lcnet_035"),
    Member(TIMM, "lcnetv2_small"),
    Member(TIMM, "legacy_seresnet18"),
    Member(TIMM, "legacy_xception"),
    Member(TIMM, "levit_128s", options={"img_size": 64}),
    Member(TIMM, "lowformer_b0"),
    Member(TIMM, "mambaout_femto"),
    Member(TIMM, "maxvit_pico_rw_256", options={"img_size": 64}),
    Member(TIMM, "mixer_s32_224", options={"img_size": 64}),
    Member(TIMM, "mobilenetv3_small_050"),
    Member(TIMM, "mobilenetv5_base"),
    Member(TIMM, "mobileone_s1", options={"img_size": 64}),
    Member(TIMM, "mobilevit_xxs", options={"img_size": 64}),
    Member(TIMM, "mvitv2_tiny", options={"img_size": 64}),
    Member(TIMM, "naflexvit_base_patch16_gap", options=_VIT),
    Member(TIMM, "nest_tiny", options={"img_size": 64}),
    Member(TIMM, "nextvit_small"),
    Member(TIMM, "nf_regnet_b0"),
    Member(TIMM, "pit_ti_224", options={"img_size": 64}),
    Member(TIMM, "pnasnet5large", (96,)),
    Member(TIMM, "poolformerv2_s12"),
    Member(TIMM, "pvt_v2_b0"),
    Member(TIMM, "qwen3_vit_88m", options={"img_size": 64, **_VIT}),
    Member(TIMM, "rdnet_tiny"),
    Member(TIMM, "regnetx_002"),
    Member(TIMM, "repghostnet_050"),
    Member(TIMM, "repvit_m1", options={"img_size": 64}),
    Member(TIMM, "res2next50"),
    Member(TIMM, "resnest14d"),
    Member(TIMM, "resnet10t"),
    Member(TIMM, "resnetv2_18"),
    Member(TIMM, "rexnet_100"),
    Member(TIMM, "sam2_hiera_tiny"),
    Member(TIMM, "selecsls42"),
    Member(TIMM, "sequencer2d_s", options={"img_size": 64}),
    Member(TIMM, "shvit_s1"),
    Member(TIMM, "skresnet18"),
    Member(TIMM, "starnet_s050"),
    Member(TIMM, "swiftformer_xs", options={"img_size": 64}),
    Member(TIMM, "swin_tiny_patch4_window7_224", options={"img_size": 64}),
    Member(TIMM, "swinv2_cr_tiny_224", options={"img_size": 64}),
    Member(TIMM, "swinv2_tiny_window8_256", options={"img_size": 64}),
    Member(TIMM, "test_vit_relpos", options={"img_size": 64}),
    Member(TIMM, "tiny_vit_5m_224"),
    Member(TIMM, "tinynet_e"),
    Member(TIMM, "tnt_s_legacy_patch16_224", options={"img_size": 64}),
    Member(TIMM, "tresnet_m"),
    Member(TIMM, "twins_svt_small", options={"img_size": 64}),
    Member(TIMM, "visformer_tiny", options={"img_size": 64}),
    Member(TIMM, "vit_tiny_patch16_224", options={"img_size": 64}),
    Member(TIMM, "vit_tiny_patch16_dinov3_qkvb", options={"img_size": 64}),
    Member(TIMM, "vit_tiny_r_s16_p8_224", options={"img_size": 64}),
    Member(TIMM, "vitamin_small_224", options={"img_size": 64}),
    Member(TIMM, "volo_d1_224", options={"img_size": 64}),
    Member(TIMM, "xception41p"),
    Member(TIMM, "xcit_nano_12_p8_224", options={"img_size": 64}),
]
MEMBERS = TORCHVISION + TIMM_MEMBERS
