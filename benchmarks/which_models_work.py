"""Which models of timm, torchvision and transformers the library works with: the whole chain on one after the other.

    pip install timm torchvision transformers
    python benchmarks/which_models_work.py [--only timm] [--models resnet18,regnetx_002] [--out tables.md]

For every architecture with batch norm, with random weights: the first norm is replaced (in the order of computation),
the layer before it is found and treated by NOG and OLR, two steps are trained under the condition monitor, a deep copy
and a new model with the state dict give the same, the folded copy agrees to 1e-5 of the largest output (or to twice the
rounding of the model itself), and the plain copy has the state dict of the model as it was. A model without batch norm
has nothing to replace, and is left out.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wellcond.monitor import ConditionMonitor
from wellcond.nn import fold, replace_batchnorm, to_plain
from wellcond.orthogonality import treat

TIMM = """
bat_resnext26ts botnet26t_256 coat_lite_tiny convit_tiny cspresnet50 cspdarknet53 densenet121 dla34 dpn48b
eca_botnext26ts_256 eca_resnet33ts edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0
efficientnet_lite0 efficientvit_b0 efficientvit_m0 fastvit_t8 fbnetc_100 fbnetv3_b gcresnet33ts gernet_s
ghostnet_050 ghostnetv3_050 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_v3 inception_v4
inception_resnet_v2 lambda_resnet26t lcnet_035 legacy_seresnet18 legacy_xception levit_128s mixnet_s mnasnet_small
mobilenet_edgetpu_v2_xs mobilenetv1_100 mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small_035
mobileone_s0 mobilevit_xxs mobilevitv2_050 nasnetalarge pnasnet5large regnetx_002 regnety_002 regnetz_005
repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnet10t resnet18 resnet26d resnetblur18
resnext26ts rexnet_100 rexnetr_100 sebotnet33ts_256 selecsls42 semnasnet_050 seresnet18 seresnext26t_32x4d shvit_s1
skresnet18 spnasnet_100 starnet_s050 swiftformer_xs tf_efficientnet_b0 tf_mixnet_s tf_mobilenetv3_small_minimal_100
tinynet_e tiny_vit_5m_224 tresnet_m vgg11_bn visformer_tiny vovnet39a ese_vovnet19b_slim wide_resnet50_2 xception41
xcit_nano_12_p8_224
"""
TORCHVISION = """
resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 efficientnet_b0 efficientnet_v2_s googlenet
inception_v3 mnasnet0_5 mnasnet1_0 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf
shufflenet_v2_x0_5 shufflenet_v2_x1_0 vgg11_bn vgg16_bn maxvit_t fcn_resnet50 deeplabv3_resnet50
lraspp_mobilenet_v3_large r3d_18 mc3_18 r2plus1d_18 s3d
"""
SMALL = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 4, "image_size": 64}
# The class, the configuration, and what makes it small.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {"depths": [1, 1, 1, 1]}),
    "regnet": ("RegNetForImageClassification", "RegNetConfig", {"depths": [1, 1, 1, 1]}),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.35}),
    "mobilevit": ("MobileViTForImageClassification", "MobileViTConfig", {}),
    "mobilevitv2": ("MobileViTV2ForImageClassification", "MobileViTV2Config", {"width_multiplier": 0.5}),
    "efficientnet": ("EfficientNetForImageClassification", "EfficientNetConfig", {"depth_coefficient": 0.2}),
    "levit": ("LevitForImageClassification", "LevitConfig", {}),
    "swiftformer": ("SwiftFormerForImageClassification", "SwiftFormerConfig", {"depths": [1, 1, 1, 1]}),
    "hgnet_v2": ("HGNetV2ForImageClassification", "HGNetV2Config", {}),
    "textnet": ("TextNetForImageClassification", "TextNetConfig", {}),
    "rt_detr_resnet": ("RTDetrResNetBackbone", "RTDetrResNetConfig", {"depths": [1, 1, 1, 1]}),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", {"depths": [1, 1, 1, 1]}),
    "upernet": ("UperNetForSemanticSegmentation", "UperNetConfig", {}),
    "dpt": ("DPTForSemanticSegmentation", "DPTConfig", {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}),
    "glpn": ("GLPNForDepthEstimation", "GLPNConfig", {"depths": [1, 1, 1, 1]}),
    "superpoint": ("SuperPointForKeypointDetection", "SuperPointConfig", {}),
    "detr": ("DetrForObjectDetection", "DetrConfig", {}),
    "seggpt": ("SegGptForImageSegmentation", "SegGptConfig", {}),
    "pp_lcnet": ("PPLCNetForImageClassification", "PPLCNetConfig", {}),
    "beit_semantic": ("BeitForSemanticSegmentation", "BeitConfig", {**SMALL, "out_indices": [1, 2, 3, 4]}),
    "data2vec_vision_semantic": (
        "Data2VecVisionForSemanticSegmentation",
        "Data2VecVisionConfig",
        {**SMALL, "out_indices": [1, 2, 3, 4]},
    ),
    "mobilevit_semantic": ("MobileViTForSemanticSegmentation", "MobileViTConfig", {}),
    "mobilenet_v2_semantic": ("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", {"depth_multiplier": 0.35}),
    "align_vision": ("AlignVisionModel", "AlignVisionConfig", {"depth_coefficient": 0.2}),
    "rt_detr": ("RTDetrForObjectDetection", "RTDetrConfig", {"encoder_layers": 1, "decoder_layers": 1}),
    "d_fine": ("DFineForObjectDetection", "DFineConfig", {"encoder_layers": 1, "decoder_layers": 2}),
    "vitpose": ("VitPoseForPoseEstimation", "VitPoseConfig", {"use_simple_decoder": False}),
}


WHOLE = "whole"


def of_timm(name: str) -> tuple[Callable[[], nn.Module], Any]:
    import timm

    def make() -> nn.Module:
        return timm.create_model(name, num_classes=10)

    cfg = make().default_cfg  # pyright: ignore[reportAttributeAccessIssue]
    size = cfg["input_size"][-1] if cfg.get("fixed_input_size") else max(96, cfg.get("min_input_size", (3, 96, 96))[-1])
    return make, torch.randn(4, 3, size, size)


def of_torchvision(name: str) -> tuple[Callable[[], nn.Module], Any]:
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    video = name in torchvision.models.list_models(torchvision.models.video)
    dense = name in torchvision.models.list_models(torchvision.models.segmentation)
    options |= {"weights_backbone": None} if dense else {}
    size = {"inception_v3": 96, "maxvit_t": 224, "s3d": 224}.get(name, 64)
    x = torch.randn(4, 3, *((16, size, size) if video else (size, size)))
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **options), x


def of_transformers(name: str) -> tuple[Callable[[], nn.Module], Any]:
    import transformers

    kind, config, options = TRANSFORMERS[name]
    settings = getattr(transformers, config)(**options)
    model = getattr(transformers, kind)
    backbone = getattr(settings, "backbone_config", None)
    size = getattr(settings, "image_size", None) or (name == "vitpose" and backbone.image_size)
    size = size or (224 if "Detection" in kind else 64)  # 300 queries need as many places
    height, width = (size, size) if isinstance(size, int) else size
    return lambda: model(copy.deepcopy(settings)), {"pixel_values": torch.randn(4, 3, height, width)}


def called(model: nn.Module, x: Any) -> Tensor:
    """The first floating tensor of the output."""
    output = model(**x) if isinstance(x, dict) else model(x)
    return next(tensors(output))


def rounding(model: nn.Module, x: Any, output: Tensor) -> Tensor:
    """How far the model's own output is from that in float64."""
    exact = {k: v.double() for k, v in x.items()} if isinstance(x, dict) else x.double()
    return (called(copy.deepcopy(model).double(), exact) - output).abs().max()


def require_near(output: Tensor, expected: Tensor, bound: float, model: nn.Module, x: Any) -> None:
    """Raise if outputs differ by more than the bound, relative to the largest, and twice the model's own rounding.

    A detector that takes the best of its candidates takes others at the least rounding.
    """
    scale = expected.abs().max()
    off = (output - expected).abs().max() / scale
    assert off < bound or off < 2 * rounding(model, x, expected) / scale, f"off by {off:.1e}"


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict) or hasattr(output, "values"):
        for one in output.values():
            yield from tensors(one)
    elif isinstance(output, (tuple, list)):
        for one in output:
            yield from tensors(one)


def chain(make: Callable[[], nn.Module], x: Any) -> tuple[str, str]:
    """The replaced norm and the treated layer; an error that says where the chain broke."""
    torch.manual_seed(0)
    model = make()
    names = list(model.state_dict())
    with step("replace"):
        (norm,) = replace_batchnorm(model, example_input=x)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with step("treat"):
        treatment = treat(model, optimizer, "nog+olr", example_input=x)
    layer = ", ".join(treatment.layers)
    with step("train"), ConditionMonitor(model, every=1) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            loss = called(model, x).square().mean()
            loss.backward()
            optimizer.step()
        assert loss.isfinite() and monitor.records, "not finite, or nothing recorded"
    treatment.remove()
    model.eval()
    with torch.no_grad():
        expected = called(model, x)
        with step("deepcopy"):
            assert torch.equal(called(copy.deepcopy(model), x), expected), "the copy gives something else"
        with step("state dict"):
            other = make()
            replace_batchnorm(other, example_input=x)
            other.load_state_dict(model.state_dict())
            assert torch.equal(called(other.eval(), x), expected), "the loaded model gives something else"
        with step("fold"):
            require_near(called(fold(model, example_input=x), x), expected, 1e-5, model, x)
        with step("plain"):
            plain = to_plain(model, example_input=x)
            require_near(called(plain, x), expected, 1e-4, model, x)
            assert list(plain.state_dict()) == names, "the plain copy has other names"
    return norm, layer


class step:
    """Names the step in the message of an error inside."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, Exception):
            raise RuntimeError(f"{self.name}: {' '.join(str(error).split())[:160]}") from error


class Found(NamedTuple):
    """What the chain gave for one model."""

    model: str
    norm: str
    layer: str
    result: str


def tried(names: Iterable[str], source: Callable[[str], tuple[Callable[[], nn.Module], Any]]) -> Iterator[Found]:
    """The models that have a batch norm, one after the other."""
    for name in names:
        begin = time.perf_counter()
        try:
            make, x = source(name)
            if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in make().modules()):
                print(f"{name}: no batch norm", flush=True)
                continue
            found = Found(name, *chain(make, x), WHOLE)
        except Exception as error:
            found = Found(name, "", "", str(error) if isinstance(error, RuntimeError) else repr(error)[:200])
        print(" | ".join(found), f"{time.perf_counter() - begin:.0f} s", flush=True)
        yield found
        gc.collect()


def section(library: str, rows: Sequence[Found]) -> str:
    """A heading with the count, and the table."""
    count = sum(row.result == WHOLE for row in rows)
    cells = ["| model | replaced norm | treated layer | chain |", "|---|---|---|---|"]
    cells += [f"| `{row.model}` | `{row.norm}` | `{row.layer}` | {row.result} |" for row in rows]
    title = f"## {library} {version(library)}: {count} of {len(rows)}"
    return "\n".join([title, "", *cells, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["timm", "torchvision", "transformers"])
    parser.add_argument("--models", help="these alone, with commas")
    parser.add_argument("--out", type=Path, help="write the tables to this file, in Markdown")
    asked = parser.parse_args()
    sources = {
        "timm": (TIMM.split(), of_timm),
        "torchvision": (TORCHVISION.split(), of_torchvision),
        "transformers": (list(TRANSFORMERS), of_transformers),
    }
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pages = []
    for library, (names, source) in sources.items():
        if asked.only in (None, library):
            pages.append(section(library, list(tried(asked.models.split(",") if asked.models else names, source))))
            print(pages[-1].splitlines()[0], flush=True)
            if asked.out:
                asked.out.write_text("\n".join(pages))


if __name__ == "__main__":
    main()
