"""The attacks, one file each.

A new attack is a file that registers a subclass of :class:`Audit`, an import here, and a contract test.
"""

from pplr.privacy.audits.alignment import Alignment
from pplr.privacy.audits.base import AUDITS, PAIRS, Attacker, Audit, Guess, Knowledge, make_audit
from pplr.privacy.audits.catalog_matching import CatalogMatching
from pplr.privacy.audits.inverter import Inverter
from pplr.privacy.audits.label_gradients import LabelGradients
from pplr.privacy.audits.label_lens import LabelLens
from pplr.privacy.audits.logit_lens import LogitLens
from pplr.privacy.audits.nearest_embedding import NearestEmbedding
from pplr.privacy.audits.pairs_regression import PairsRegression
from pplr.privacy.audits.posterior_matching import PosteriorMatching
from pplr.privacy.audits.vocabulary_matching import VocabularyMatching

__all__ = [
    "AUDITS",
    "PAIRS",
    "Alignment",
    "Attacker",
    "Audit",
    "CatalogMatching",
    "Guess",
    "Inverter",
    "Knowledge",
    "LabelGradients",
    "LabelLens",
    "LogitLens",
    "NearestEmbedding",
    "PairsRegression",
    "PosteriorMatching",
    "VocabularyMatching",
    "make_audit",
]
