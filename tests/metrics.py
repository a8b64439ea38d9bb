"""Metrics for tests of whole steps: constructor, update, and if mode FULL is expected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torchmetrics as tm
from torch import Tensor, nn
from torchmetrics import classification as c
from torchmetrics.retrieval import RetrievalMRR
from torchmetrics.segmentation import DiceScore
from torchmetrics.wrappers import (
    BootStrapper,
    ClasswiseWrapper,
    MetricTracker,
    MinMaxMetric,
    MultioutputWrapper,
    Running,
)

from cg_lightning.core.causes import Cause

CLASSES = 4
ANY = (Cause.HOST_SYNC, Cause.DATA_DEPENDENT_SHAPE, Cause.HOST_RANDOMNESS)
Update = Callable[[nn.Module, Tensor, Tensor], Any]


def _multiclass(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    return metric(x[:, :CLASSES], label)


def _binary(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    return metric(x[:, 0].sigmoid(), label % 2)


def _multilabel(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    return metric(x[:, :CLASSES], (x[:, CLASSES:] > 0).long())


def _regression(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    return metric(x[:, 0], x[:, 1])


def _value(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    return metric(x[:, 0])


def _distributions(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    return metric(x.softmax(1), x.flip(1).softmax(1))


def _images(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    images = x[:, :, None, None].sigmoid().expand(-1, -1, 16, 16) * torch.linspace(
        0, 1, 16, device=x.device
    )
    return metric(images, images.flip(3))


def _one_image(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    return metric(
        x[:, :, None, None].expand(-1, -1, 4, 4) * torch.linspace(0, 1, 4, device=x.device)
    )


TEXTS = ["the cat sat on the mat", "a dog ran to the tree"]


def _texts(metric: nn.Module, x: Tensor, label: Tensor) -> Any:
    return metric(TEXTS, TEXTS[::-1])


@dataclasses.dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    call: Update
    reason: Cause | tuple[Cause, ...] | None = None
    """Why a step that calls ``update`` is not FULL. None if it is."""
    forward_reason: Cause | tuple[Cause, ...] | None = None
    """The same for a step that calls the metric to get the value of the batch."""


CASES: dict[str, Case] = {
    "Accuracy": Case(lambda: tm.Accuracy("multiclass", num_classes=CLASSES), _multiclass),
    "Accuracy, macro": Case(lambda: c.MulticlassAccuracy(CLASSES), _multiclass),
    "Accuracy, binary": Case(c.BinaryAccuracy, _binary),
    "Accuracy, ignore_index": Case(
        lambda: c.MulticlassAccuracy(CLASSES, ignore_index=0), _multiclass
    ),
    "Accuracy, micro, ignore_index": Case(
        lambda: c.MulticlassAccuracy(CLASSES, ignore_index=1, average="micro"), _multiclass
    ),
    "F1Score, binary, ignore_index": Case(lambda: c.BinaryF1Score(ignore_index=0), _binary),
    "ConfusionMatrix, ignore_index": Case(
        lambda: c.MulticlassConfusionMatrix(CLASSES, ignore_index=2), _multiclass
    ),
    "ConfusionMatrix, binary, ignore_index": Case(
        lambda: c.BinaryConfusionMatrix(ignore_index=1), _binary
    ),
    "ConfusionMatrix, multilabel, ignore_index": Case(
        lambda: c.MultilabelConfusionMatrix(CLASSES, ignore_index=0), _multilabel
    ),
    "JaccardIndex, ignore_index": Case(
        lambda: c.MulticlassJaccardIndex(CLASSES, ignore_index=3), _multiclass
    ),
    "F1Score": Case(lambda: tm.F1Score("multiclass", num_classes=CLASSES), _multiclass),
    "Precision": Case(lambda: c.MulticlassPrecision(CLASSES), _multiclass),
    "Recall": Case(lambda: c.MulticlassRecall(CLASSES), _multiclass),
    "ConfusionMatrix": Case(lambda: c.MulticlassConfusionMatrix(CLASSES), _multiclass),
    "ConfusionMatrix, binary": Case(c.BinaryConfusionMatrix, _binary),
    "AUROC, binned": Case(
        lambda: c.MulticlassAUROC(CLASSES, thresholds=20), _multiclass, None, Cause.HOST_SYNC
    ),
    "AUROC, exact": Case(lambda: c.MulticlassAUROC(CLASSES), _multiclass, None, ANY),
    "AveragePrecision, binned": Case(lambda: c.BinaryAveragePrecision(thresholds=20), _binary),
    "AveragePrecision, exact": Case(c.BinaryAveragePrecision, _binary, None, ANY),
    "CohenKappa": Case(lambda: c.MulticlassCohenKappa(CLASSES), _multiclass),
    "MatthewsCorrCoef": Case(lambda: c.MulticlassMatthewsCorrCoef(CLASSES), _multiclass),
    "MatthewsCorrCoef, binary": Case(c.BinaryMatthewsCorrCoef, _binary, None, Cause.HOST_SYNC),
    "JaccardIndex": Case(lambda: c.MulticlassJaccardIndex(CLASSES), _multiclass),
    "MeanSquaredError": Case(tm.MeanSquaredError, _regression),
    "MeanAbsoluteError": Case(tm.MeanAbsoluteError, _regression),
    "R2Score": Case(tm.R2Score, _regression),
    "PearsonCorrCoef": Case(tm.PearsonCorrCoef, _regression),
    "SpearmanCorrCoef": Case(tm.SpearmanCorrCoef, _regression, None, Cause.DATA_DEPENDENT_SHAPE),
    "ExplainedVariance": Case(tm.ExplainedVariance, _regression),
    "CosineSimilarity": Case(tm.CosineSimilarity, _distributions),
    "KLDivergence": Case(tm.KLDivergence, _distributions),
    "MeanMetric of one value": Case(tm.MeanMetric, lambda m, x, label: m(x.mean())),
    "SumMetric of one value": Case(tm.SumMetric, lambda m, x, label: m(x.mean())),
    "MaxMetric of one value": Case(tm.MaxMetric, lambda m, x, label: m(x.max())),
    "MinMetric of one value": Case(tm.MinMetric, lambda m, x, label: m(x.min())),
    "MeanMetric": Case(tm.MeanMetric, _value, None, Cause.HOST_SYNC),
    "MeanMetric, nan_strategy=disable": Case(lambda: tm.MeanMetric(nan_strategy="disable"), _value),
    "SumMetric": Case(tm.SumMetric, _value, None, Cause.HOST_SYNC),
    "SumMetric, nan_strategy=disable": Case(lambda: tm.SumMetric(nan_strategy="disable"), _value),
    "MaxMetric": Case(tm.MaxMetric, _value, None, Cause.HOST_SYNC),
    "MaxMetric, nan_strategy=disable": Case(lambda: tm.MaxMetric(nan_strategy="disable"), _value),
    "MinMetric": Case(tm.MinMetric, _value, None, Cause.HOST_SYNC),
    "MinMetric, nan_strategy=disable": Case(lambda: tm.MinMetric(nan_strategy="disable"), _value),
    "CatMetric": Case(tm.CatMetric, _value, None, Cause.HOST_SYNC),
    "CatMetric, nan_strategy=disable": Case(lambda: tm.CatMetric(nan_strategy="disable"), _value),
    "Perplexity": Case(
        tm.text.Perplexity,
        lambda m, x, label: m(x[:, None, :CLASSES].softmax(-1), label[:, None]),
        None,
        Cause.DATA_DEPENDENT_SHAPE,
    ),
    "PeakSignalNoiseRatio": Case(
        lambda: tm.image.PeakSignalNoiseRatio(data_range=1.0),
        _images,
        None,
        Cause.METRIC_UPDATED,
    ),
    "StructuralSimilarity": Case(
        lambda: tm.image.StructuralSimilarityIndexMeasure(data_range=1.0), _images
    ),
    "TotalVariation": Case(tm.image.TotalVariation, _one_image),
    "DiceScore": Case(
        lambda: DiceScore(CLASSES, input_format="index"),
        lambda m, x, label: m((x[:, :CLASSES] > 0).long(), label[:, None].expand(-1, CLASSES)),
    ),
    "SignalNoiseRatio": Case(tm.audio.SignalNoiseRatio, _distributions),
    "ScaleInvariantSignalNoiseRatio": Case(tm.audio.ScaleInvariantSignalNoiseRatio, _distributions),
    "RetrievalMRR": Case(
        RetrievalMRR,
        lambda m, x, label: m(x[:, 0].sigmoid(), label > 1, indexes=label % 2),
        None,
        Cause.HOST_SYNC,
    ),
    "RunningMean": Case(
        lambda: Running(tm.MeanSquaredError(), window=3),
        _regression,
        None,
        Cause.METRIC_UPDATED,
    ),
    "MetricTracker": Case(lambda: MetricTracker(tm.MeanSquaredError()), _regression),
    "ClasswiseWrapper": Case(
        lambda: ClasswiseWrapper(c.MulticlassAccuracy(CLASSES, average=None)), _multiclass
    ),
    "MinMaxMetric": Case(lambda: MinMaxMetric(tm.MeanSquaredError()), _regression),
    "MinMaxMetric, binned AUROC": Case(
        lambda: MinMaxMetric(c.MulticlassAUROC(CLASSES, thresholds=20)),
        _multiclass,
        None,
        Cause.HOST_SYNC,
    ),
    "MultioutputWrapper": Case(
        lambda: MultioutputWrapper(tm.MeanSquaredError(), 2),
        lambda m, x, label: m(x[:, :2], x[:, 2:4]),
        None,
        Cause.DATA_DEPENDENT_SHAPE,
    ),
    # the number of draws of each row is random, so the first shape is random as well
    "BootStrapper": Case(lambda: BootStrapper(tm.MeanSquaredError(), 3), _regression, None, ANY),
    "CharErrorRate": Case(tm.text.CharErrorRate, _texts, None, Cause.METRIC_UPDATED),
    "WordErrorRate": Case(tm.text.WordErrorRate, _texts, None, Cause.METRIC_UPDATED),
    "BLEUScore": Case(
        tm.text.BLEUScore,
        lambda m, x, label: m(TEXTS, [[text, "another one"] for text in TEXTS[::-1]]),
        None,
        (Cause.METRIC_UPDATED, Cause.HOST_SYNC),
    ),
    "EditDistance": Case(tm.text.EditDistance, _texts, None, Cause.METRIC_UPDATED),
    "MetricCollection": Case(
        lambda: tm.MetricCollection([c.MulticlassPrecision(CLASSES), c.MulticlassRecall(CLASSES)]),
        _multiclass,
    ),
    "MetricCollection, no compute groups": Case(
        lambda: tm.MetricCollection(
            [c.MulticlassPrecision(CLASSES), tm.CatMetric(nan_strategy="disable")][:1],
            compute_groups=False,
        ),
        _multiclass,
    ),
}
