"""Faults of what crosses from a trainer to an engine."""

from __future__ import annotations

from faults.mutant import Mutant

CHECKSUM = "tests/transfer/test_checksum.py"

TRANSFER = [
    Mutant(
        name="forget the place of a word",
        file="transfer/checksum_numpy.py",
        old="(block ^ (places * np.uint64(PLACE)))",
        new="block",
        test=f"{CHECKSUM}::test_the_place_of_a_word_counts",
    ),
    Mutant(
        name="count the places of every block from 0",
        file="transfer/checksum_numpy.py",
        old="np.arange(start, start + len(block), dtype=np.uint64)",
        new="np.arange(len(block), dtype=np.uint64)",
        test=f"{CHECKSUM}::test_blocks_that_change_places_change_the_checksum",
    ),
    Mutant(
        name="take the whole buffer as one block",
        file="transfer/checksum_numpy.py",
        old="_BLOCK = 1 << 17",
        new="_BLOCK = 1 << 40",
        test=f"{CHECKSUM}::test_it_makes_no_copy_of_the_buffer",
    ),
    Mutant(
        name="add the words behind the end of a buffer",
        file="transfer/checksum_kernel.py",
        old="tl.where(inside, mixed, 0)",
        new="mixed",
        test=f"{CHECKSUM}::test_the_kernel_in_the_interpreter",
    ),
    Mutant(
        name="shift words with their sign on a GPU",
        file="transfer/checksum_kernel.py",
        old="(words >> bits) & ((1 << (64 - bits)) - 1)",
        new="words >> bits",
        test=f"{CHECKSUM}::test_the_kernel_in_the_interpreter",
    ),
    Mutant(
        name="add only the first blocks of a long buffer on a GPU",
        file="transfer/checksum_kernel.py",
        old="        start += step\n",
        new="        start += count\n",
        test=f"{CHECKSUM}::test_the_kernel_in_the_interpreter",
    ),
    Mutant(
        name="compare a checksum with anything",
        file="transfer/checksum.py",
        old='    _check_stored("stored", stored, payload.device)\n',
        new="",
        test=f"{CHECKSUM}::test_what_is_not_a_checksum_is_refused",
    ),
]
