"""Small versions of the architectures that the engine is promised for: every block kind of the original, few of them, on small images.

Their exported graphs are kept in `graphs/`, without weights; `python tests/toy_networks.py` writes them anew.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from twofour.sources.torchvision_compat import import_torchvision

IMAGE = 32


class _Segmenter(nn.Module):
    """A backbone and the DeepLabV3 head, resized back to the image, as torchvision's segmentation networks do."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.resnet import Bottleneck, ResNet
        from torchvision.models.segmentation.deeplabv3 import DeepLabHead

        net = ResNet(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True], width_per_group=4)
        self.body = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3)
        self.head = DeepLabHead(1024, 5, atrous_rates=(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.head(self.body(x)), size=x.shape[-2:], mode="bilinear", align_corners=False)


def _resnet() -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [2, 1, 1, 1], groups=2, width_per_group=8, num_classes=10)


def _mobilenet_v2() -> nn.Module:
    from torchvision.models import MobileNetV2

    return MobileNetV2(num_classes=10, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]])


def _efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

    setting = [
        FusedMBConvConfig(2, 3, 1, 16, 16, 1),
        MBConvConfig(1, 3, 1, 16, 24, 1, 1, 1),
        MBConvConfig(6, 5, 2, 24, 40, 2, 1, 1),
    ]
    return EfficientNet(setting, dropout=0.1, num_classes=10)


def _regnet() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(
        BlockParams(depths=[1, 2], widths=[16, 32], group_widths=[8, 8], bottleneck_multipliers=[1, 1], strides=[2, 2], se_ratio=0.25)
    )


def _densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=8, block_config=(3, 2), num_init_features=16, num_classes=10)


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 1)], num_classes=10, layer_scale=0.5)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    net = VisionTransformer(image_size=IMAGE, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10)
    nn.init.normal_(net.heads.head.weight, std=0.1)
    return net


def _timm_vit() -> nn.Module:
    import timm

    return timm.models.vision_transformer.VisionTransformer(
        img_size=IMAGE, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=10, qk_norm=True, init_values=0.5
    )


def _mixer() -> nn.Module:
    import timm

    net = timm.models.mlp_mixer.MlpMixer(img_size=IMAGE, patch_size=8, embed_dim=32, num_blocks=2, num_classes=10)
    nn.init.normal_(net.head.weight, std=0.1)
    return net


def _inception() -> nn.Module:
    from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC

    return nn.Sequential(
        BasicConv2d(3, 16, kernel_size=3, stride=2),
        nn.MaxPool2d(3, 2),
        InceptionA(16, 16),
        InceptionB(240),
        InceptionC(240 + 480, 16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(768, 10),
    )


def _swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [2, 2], num_classes=10)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": _resnet,
    "mobilenet_v2": _mobilenet_v2,
    "efficientnet": _efficientnet,
    "regnet": _regnet,
    "densenet": _densenet,
    "convnext": _convnext,
    "vit": _vit,
    "timm_vit": _timm_vit,
    "mlp_mixer": _mixer,
    "inception": _inception,
    "swin": _swin,
    "deeplab_v3": _Segmenter,
}


def make(name: str) -> nn.Module:
    """A network in eval mode."""
    import_torchvision()
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def export(name: str, path: Path, **options: object) -> nn.Module:
    """Write the network as ONNX with a dynamic batch; return it."""
    net = make(name)
    batch = torch.export.Dim.DYNAMIC
    x = torch.zeros(2, 3, IMAGE, IMAGE)
    with torch.no_grad():
        program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False, **options)
    program.save(path, external_data=False)
    return net


def main(folder: Path) -> None:
    """Write every network's graph, without its weights, to `folder`."""
    from graphs import strip

    for name in NETWORKS:
        path = folder / f"{name}.onnx"
        export(name, path)
        (folder / f"{name}.onnx.gz").write_bytes(strip(path.read_bytes()))
        path.unlink()


if __name__ == "__main__":
    main(Path(__file__).parent / "graphs")
