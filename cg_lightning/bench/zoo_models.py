"""Models of other libraries, with random weights: what they are given, and which library has them.

All are small. A transformer's batches have masks of ones, padded masks and no mask in turn, because
its code takes other paths for them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 10
_VOCABULARY = 99
_ROWS, _TOKENS, _PIXELS = 4, 24, 64
Inputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """A model and its batches."""

    library: str
    """The package to import; it may be missing."""
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    """Makes the keyword arguments of ``forward`` for the batch of that number."""

    @property
    def is_available(self) -> bool:
        """Whether the library is installed."""
        return importlib.util.find_spec(self.library) is not None


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pixels(size: int, name: str = "x") -> Callable[[int], Inputs]:
    def inputs(seed: int) -> Inputs:
        return {name: torch.randn(_ROWS, 3, size, size, generator=_random(seed))}

    return inputs


def _ids(generator: torch.Generator, tokens: int = _TOKENS) -> Tensor:
    return torch.randint(3, _VOCABULARY, (_ROWS, tokens), generator=generator)


def _mask(seed: int, generator: torch.Generator) -> Tensor:
    """Return a mask of ones, or one with padding at the end, in turn."""
    if seed % 2 == 0:
        return torch.ones(_ROWS, _TOKENS, dtype=torch.long)
    lengths = torch.randint(_TOKENS // 2, _TOKENS, (_ROWS, 1), generator=generator)
    return (torch.arange(_TOKENS) < lengths).long()


def _tokens(seed: int) -> Inputs:
    generator = _random(seed)
    inputs = {"input_ids": _ids(generator)}
    if seed % 3 < 2:
        inputs["attention_mask"] = _mask(seed % 3, generator)
    return inputs


def _two_texts(seed: int) -> Inputs:
    generator = _random(seed)
    return {**_tokens(seed), "decoder_input_ids": _ids(generator, _TOKENS // 2)}


def _text_and_pixels(seed: int) -> Inputs:
    return {**_tokens(seed), **_pixels(32, "pixel_values")(seed)}


def _waves(seed: int) -> Inputs:
    inputs = {"input_values": torch.randn(_ROWS, 4000, generator=_random(seed))}
    if seed % 3 != 2:
        mask = torch.ones(_ROWS, 4000, dtype=torch.long)
        if seed % 3 == 1:
            mask[0, 3000:] = 0
        inputs["attention_mask"] = mask
    return inputs


def _mels(seed: int) -> Inputs:
    return {"input_features": torch.randn(_ROWS, 80, 3000, generator=_random(seed))}


def _torchvision(name: str, pixels: int = _PIXELS, **arguments: Any) -> ZooModel:
    def make() -> nn.Module:
        models: Any = importlib.import_module("torchvision.models")
        model: nn.Module = models.get_model(name, weights=None, **arguments)
        return model

    return ZooModel("torchvision", make, _pixels(pixels))


def _timm(name: str, **arguments: Any) -> ZooModel:
    def make() -> nn.Module:
        model: nn.Module = importlib.import_module("timm").create_model(
            name, num_classes=CLASSES, **arguments
        )
        return model

    return ZooModel("timm", make, _pixels(_PIXELS))


_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_labels": CLASSES,
}
_SMALL_TEXT = {**_SMALL, "vocab_size": _VOCABULARY, "pad_token_id": 0}
_SMALL_IMAGE = {**_SMALL, "image_size": 32, "patch_size": 8}


def _transformers(
    config: str, model: str, inputs: Callable[[int], Inputs], small: dict[str, Any], **more: Any
) -> ZooModel:
    def make() -> nn.Module:
        library: Any = importlib.import_module("transformers")
        made: nn.Module = getattr(library, model)(getattr(library, config)(**{**small, **more}))
        return made

    return ZooModel("transformers", make, inputs)


def _text(name: str, head: str = "ForSequenceClassification", **more: Any) -> ZooModel:
    return _transformers(f"{name}Config", f"{name}{head}", _tokens, _SMALL_TEXT, **more)


def _image(name: str) -> ZooModel:
    inputs = _pixels(32, "pixel_values")
    model = f"{name}ForImageClassification"
    return _transformers(f"{name}Config", model, inputs, _SMALL_IMAGE)


class _Graph(nn.Module):
    """Two layers of a graph network on a graph that does not change."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        make: Any = getattr(importlib.import_module("torch_geometric.nn"), layer)
        sizes = [(16, 16), (16, CLASSES)]
        if layer == "GINConv":  # Xu et al., 2019: it is given a network
            layers = [make(nn.Linear(*size)) for size in sizes]
        else:
            layers = [make(*size) for size in sizes]
        self.layers = nn.ModuleList(layers)
        self.register_buffer("edges", torch.randint(0, 40, (2, 160), generator=_random(0)))

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(nodes, features)`` to logits."""
        for layer in self.layers:
            x = layer(x, self.edges).relu()
        return x


def _graph(layer: str) -> ZooModel:
    return ZooModel("torch_geometric", lambda: _Graph(layer), _nodes)


def _nodes(seed: int) -> Inputs:
    return {"x": torch.randn(40, 16, generator=_random(seed))}


class _SelfAttention(nn.Module):
    """Attention, a recurrent layer and a linear one on sequences ``(batch, time, 32)``."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.rnn = nn.LSTM(32, 32, 2, batch_first=True)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return logits of ``x``; ``padding`` marks positions ``(batch, time)`` to ignore."""
        x = self.encoder(x, src_key_padding_mask=padding)
        logits: Tensor = self.head(self.rnn(x)[0].mean(dim=1))
        return logits


class _Recurrent(nn.Module):
    """A recurrent layer, and a linear one on its last output."""

    def __init__(self, layer: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = layer(32, 32, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return logits of ``x``; positions that ``padding`` marks are set to zero."""
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0.0)
        logits: Tensor = self.head(self.rnn(x)[0][:, -1])
        return logits


class _TwoTexts(nn.Module):
    """An encoder and a decoder with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 32)
        self.net = nn.Transformer(32, 4, 1, 1, 64, batch_first=True)

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return logits of each token of the decoder."""
        causal = nn.Transformer.generate_square_subsequent_mask(
            decoder_input_ids.shape[1], device=input_ids.device
        )
        padding = None if attention_mask is None else attention_mask == 0
        source, target = self.embed(input_ids), self.embed(decoder_input_ids)
        output = self.net(source, target, tgt_mask=causal, src_key_padding_mask=padding)
        logits: Tensor = output @ self.embed.weight.T
        return logits


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, groups=4), nn.GroupNorm(4, 32), nn.GELU(),
        nn.ConvTranspose2d(32, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def _unnamed_pixels(seed: int) -> Inputs:
    return {"input": torch.randn(_ROWS, 3, 32, 32, generator=_random(seed))}


def _sequences(seed: int) -> Inputs:
    generator = _random(seed)
    x = torch.randn(_ROWS, _TOKENS, 32, generator=generator)
    return {"x": x, "padding": _mask(1, generator) == 0} if seed % 2 else {"x": x}


MODELS: dict[str, ZooModel] = {
    "torch_attention_lstm": ZooModel("torch", _SelfAttention, _sequences),
    "torch_gru": ZooModel("torch", lambda: _Recurrent(nn.GRU), _sequences),
    "torch_rnn": ZooModel("torch", lambda: _Recurrent(nn.RNN), _sequences),
    "torch_transformer": ZooModel("torch", _TwoTexts, _two_texts),
    "torch_convolutions": ZooModel("torch", _convolutions, _unnamed_pixels),
    **{
        f"pyg_{name.lower()}": _graph(f"{name}Conv")
        for name in ("GCN", "SAGE", "GAT", "GATv2", "GIN", "Graph")
    },
    **{
        f"tv_{name}": _torchvision(name, num_classes=CLASSES)
        for name in (
            "resnet18", "resnext50_32x4d", "wide_resnet50_2", "vgg11_bn", "alexnet", "densenet121",
            "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "efficientnet_v2_s",
            "shufflenet_v2_x1_0", "squeezenet1_1", "mnasnet0_5", "regnet_y_400mf", "convnext_tiny",
            "swin_t", "swin_v2_t", "googlenet",
        )
    },
    "tv_vit_b_16": _torchvision("vit_b_16", image_size=32, num_classes=CLASSES, pixels=32),
    "tv_deeplabv3_mobilenet_v3_large": _torchvision(
        "deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=CLASSES
    ),
    "tv_fcn_resnet50": _torchvision("fcn_resnet50", weights_backbone=None, num_classes=CLASSES),
    **{
        f"timm_{name}": _timm(name)
        for name in (
            "resnet18", "resnetv2_50", "efficientnet_b0", "convnext_atto", "regnety_002",
            "mobilenetv3_small_100", "ghostnet_100", "edgenext_xx_small", "hrnet_w18_small",
            "mixnet_s", "repvgg_a0", "lcnet_050", "tinynet_e", "mobilenetv2_050", "convnextv2_atto",
            "semnasnet_075", "fbnetc_100",
        )
    },
    **{
        f"timm_{name}": _timm(name, img_size=_PIXELS)
        for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224", "mixer_s16_224")
    },
    **{
        f"hf_{name.lower()}": _text(name)
        for name in ("Bert", "Roberta", "Electra", "Albert", "XLMRoberta", "Ernie", "MPNet")
    },
    "hf_albert_base": _text("Albert", "Model", embedding_size=32),
    "hf_bert_tokens": _text("Bert", "ForTokenClassification"),
    "hf_bert_masked": _text("Bert", "ForMaskedLM"),
    "hf_distilbert": _transformers(
        "DistilBertConfig", "DistilBertForSequenceClassification", _tokens,
        {"vocab_size": _VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    ),
    "hf_deberta_v2": _text(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    ),
    "hf_modernbert": _text("ModernBert"),
    "hf_llama": _text("Llama", "ForCausalLM"),
    "hf_llama_no_cache": _text("Llama", "ForCausalLM", use_cache=False),
    "hf_mistral": _text("Mistral", "ForCausalLM", num_key_value_heads=2),
    "hf_qwen2": _text("Qwen2", "ForCausalLM", num_key_value_heads=2),
    "hf_qwen3": _text("Qwen3", "ForCausalLM", num_key_value_heads=2, head_dim=16),
    "hf_gemma": _text("Gemma", "ForCausalLM", num_key_value_heads=2, head_dim=16),
    "hf_gpt2": _transformers(
        "GPT2Config", "GPT2LMHeadModel", _tokens,
        {"vocab_size": _VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4},
    ),
    "hf_gpt_neox": _text("GPTNeoX", "ForCausalLM"),
    "hf_opt": _text("OPT", "ForCausalLM", ffn_dim=96, word_embed_proj_dim=64),
    "hf_mamba": _transformers(
        "MambaConfig", "MambaForCausalLM", _tokens,
        {"vocab_size": _VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    ),
    "hf_t5": _transformers(
        "T5Config", "T5ForConditionalGeneration", _two_texts,
        {"vocab_size": _VOCABULARY, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2,
         "num_heads": 4},
    ),
    "hf_bart": _transformers(
        "BartConfig", "BartForConditionalGeneration", _two_texts,
        {"vocab_size": _VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
         "decoder_ffn_dim": 96},
    ),
    "hf_clip": _transformers(
        "CLIPConfig", "CLIPModel", _text_and_pixels,
        {"text_config": {**_SMALL_TEXT, "eos_token_id": 2}, "vision_config": _SMALL_IMAGE},
    ),
    "hf_vit": _image("ViT"),
    "hf_deit": _image("DeiT"),
    "hf_beit": _image("Beit"),
    "hf_dinov2": _image("Dinov2"),
    "hf_swin": _transformers(
        "SwinConfig", "SwinForImageClassification", _pixels(32, "pixel_values"),
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "window_size": 2,
         "num_heads": [2, 4], "num_labels": CLASSES},
    ),
    "hf_segformer": _transformers(
        "SegformerConfig", "SegformerForSemanticSegmentation", _pixels(_PIXELS, "pixel_values"),
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2],
         "mlp_ratios": [2, 2], "decoder_hidden_size": 32, "num_labels": CLASSES},
    ),
    "hf_wav2vec2": _transformers(
        "Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", _waves,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "conv_dim": [16, 16, 16], "conv_stride": [5, 4, 4],
         "conv_kernel": [10, 4, 4], "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "num_labels": CLASSES},
    ),
    "hf_whisper_encoder": _transformers(
        "WhisperConfig", "WhisperForAudioClassification", _mels,
        {"vocab_size": _VOCABULARY, "d_model": 32, "encoder_layers": 2,
         "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_layers": 1,
         "decoder_attention_heads": 4, "classifier_proj_size": 16, "num_labels": CLASSES,
         "pad_token_id": 0},
    ),
}  # fmt: skip
"""The models by name."""
