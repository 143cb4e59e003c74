"""Similarity-Distance-Magnitude activations and estimators (arXiv 2509.12760), in torch alone.

This package holds only mathematics: no paths, no logging, no clock, no environment. Read it in this order:

    adaptor        h -> h', z'
    arithmetic     sums that do not depend on the batch
    support        exemplars, exact nearest search
    sketch         bytes that settle most of a large support's distances
    similarity     q
    distance       d
    activation     SDM(z') and its loss
    region         q', Algorithm 1, admission
    sample_size    effective sample size, bands around d
    estimator      all of it together: h -> Estimate
    ensemble       J models, one verdict
    conventions    where papers, public code and this project differ
"""

from candor.sdm.adaptor import ExemplarAdaptor, fit_standardisation
from candor.sdm.conventions import DEFAULT, RECORDED, Conventions
from candor.sdm.distance import ClasswiseECDF
from candor.sdm.ensemble import EnsembleEstimate, combine
from candor.sdm.estimator import STATE_NAMES, SDMEstimator
from candor.sdm.outputs import Calibration, Estimate, Measurement
from candor.sdm.region import Region, find_region
from candor.sdm.support import Support

__all__ = [
    "DEFAULT",
    "RECORDED",
    "STATE_NAMES",
    "Calibration",
    "ClasswiseECDF",
    "Conventions",
    "EnsembleEstimate",
    "Estimate",
    "ExemplarAdaptor",
    "Measurement",
    "Region",
    "SDMEstimator",
    "Support",
    "combine",
    "find_region",
    "fit_standardisation",
]
