"""The short form of the fault campaign: first answers under random kills, a full disk, a second writer, a missing image."""

import os

from campaign import LATE, Campaign


def test_rows_survive_random_faults(tmp_path, monkeypatch):
    """The long form is `make faults`; it has all stages, training and Snakemake itself as well."""
    for name, value in {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        monkeypatch.setitem(os.environ, name, value)
    campaign = Campaign(tmp_path, scale=0.05, seed=1, shards=1)
    campaign.find_truth("answers")
    campaign.by_hand(kills=6, training=0, others=True)
    assert not campaign.faults, campaign.faults
    assert (campaign.lost, campaign.doubled, campaign.strange) == (0, 0, 0)
    assert (campaign.looked_at > 10, campaign.half_written) == (True, 0)
    harms = {what for _, what in campaign.events} - {LATE}
    assert campaign.kills() >= 3 and {"second writer", "truncated piece", "missing image"} <= harms, campaign.events
