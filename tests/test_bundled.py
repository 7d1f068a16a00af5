"""The bundled models are what their recipes make."""

from pathlib import Path

import pytest
import torch

from varl.build import model_path
from varl.checkpoints import model as model_folder
from varl.checkpoints.folder import load_config, load_notes
from varl.config import ClassifierConfig, PretrainConfig, RasterConfig
from varl.data.glyphs import pictures as glyph_pictures
from varl.data.words import dataset, split, word_list
from varl.pretrain.classifier import labels_of
from varl.pretrain.data import signed
from varl.pretrain.next_scale import NextScaleFamily
from varl.pretrain.raster import RasterFamily
from varl.pretrain.run import pretrain
from varl.pretrain.transformer import known
from varl.recipes.pretrain import glyphs_cpu, glyphs_judge, glyphs_reward, words_cpu
from varl.settings import classifier_from_yaml, model_from_yaml
