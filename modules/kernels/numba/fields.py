"""The arguments of the kernels: structures that lie at the address a kernel is called with."""

from __future__ import annotations

import ctypes

import numpy as np

_ADDRESS = _STRIDE = _COUNT = ctypes.c_int64  # strides in bytes


class AttentionFields(ctypes.Structure):
    """What the attention kernel is called with."""

    _fields_ = (
        # sizes
        ("batch", _COUNT),
        ("kv_heads", _COUNT),
        ("group", _COUNT),  # query heads of a KV head
        ("queries", _COUNT),  # new columns
        ("capacity", _COUNT),  # packed tokens there is room for
        ("sinks", _COUNT),
        ("ring", _COUNT),
        ("row_tiles", _COUNT),
        ("units", _COUNT),
        ("splits", _COUNT),  # shares that the tokens of a unit are cut into
        # new states
        ("query", _ADDRESS),
        ("query_batch", _STRIDE),
        ("query_head", _STRIDE),
        ("query_token", _STRIDE),
        ("new_key", _ADDRESS),
        ("new_key_batch", _STRIDE),
        ("new_key_head", _STRIDE),
        ("new_value", _ADDRESS),  # as it is stored: rotated
        ("new_value_batch", _STRIDE),
        ("new_value_head", _STRIDE),
        # the layer, contiguous
        ("k_codes", _ADDRESS),
        ("k_scale", _ADDRESS),
        ("k_minimum", _ADDRESS),
        ("k_extra", _ADDRESS),
        ("k_order", _ADDRESS),
        ("k_sinks", _ADDRESS),
        ("k_window", _ADDRESS),
        ("v_codes", _ADDRESS),
        ("v_scale", _ADDRESS),
        ("v_minimum", _ADDRESS),
        ("v_sinks", _ADDRESS),
        ("v_window", _ADDRESS),
        # what is worked in and given back
        ("lengths", _ADDRESS),  # int64 [3, batch]: stored, packed and new tokens
        ("scratch", _ADDRESS),  # float32 [threads, scratch_floats]
        ("partial", _ADDRESS),  # float32 [units, partial_floats]
        ("out", _ADDRESS),  # float32 [batch, queries, heads, head_dim]
        # a step that stores its one token: values as the model gives them, and what becomes of them
        ("stores", _COUNT),
        ("rotates", _COUNT),
        ("at_once", _COUNT),  # it goes among the packed tokens, of which there is room for one more
        ("k_static", _ADDRESS),  # float32 [3, kv_heads, head_dim]: scale, inverse and offset; 0 where the side has none
        ("v_static", _ADDRESS),
        ("given_value", _ADDRESS),
        ("given_value_batch", _STRIDE),
        ("given_value_head", _STRIDE),
        ("scaling", ctypes.c_float),  # of scores in base 2
        ("k_limit", ctypes.c_float),
        ("v_limit", ctypes.c_float),
        ("k_largest", ctypes.c_float),  # found: the largest magnitudes
        ("v_largest", ctypes.c_float),
    )


class PackingFields(ctypes.Structure):
    """What the packing kernel is called with."""

    _fields_ = (
        ("heads", _COUNT),
        ("groups", _COUNT),  # units of a head in one job
        ("source", _ADDRESS),
        ("source_row", _STRIDE),
        ("source_head", _STRIDE),
        ("source_token", _STRIDE),
        ("capacity", _COUNT),  # packed tokens the targets have room for, contiguous [rows, heads, capacity, …]
        ("codes", _ADDRESS),
        ("scale", _ADDRESS),
        ("minimum", _ADDRESS),
        ("extra", _ADDRESS),
        ("order", _ADDRESS),
        ("jobs", _ADDRESS),  # int64 [jobs, 3]: row, first token of the source, first packed token
        ("job_count", _COUNT),
        ("scratch", _ADDRESS),  # float32 [threads, scratch_floats]
        ("largest", _ADDRESS),  # int32 [units]: bits of the largest magnitude of each
    )


SCALE, INVERSE, OFFSET = range(3)  # of `k_static` and `v_static`
ATTENTION, PACKING = np.dtype(AttentionFields), np.dtype(PackingFields)  # as compiled code has them
LENGTH, PACKED, NEW = range(3)  # rows of `lengths`
ROW, SOURCE, TARGET = range(3)  # columns of `jobs`
