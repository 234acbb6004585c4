"""The counts of a projector's exchange in several processes."""

import json

from conftest import ROOT

from bench import exchange, ranks


def test_the_document_has_the_tables_of_the_results():
    results = json.loads((ROOT / exchange.PATH).read_text())
    document = (ROOT / exchange.DOCUMENT).read_text()
    assert exchange.table(results["rows"]) in document and exchange.table_of_times(results["times"]) in document


def test_times():
    """In two processes, of a projector that is small; the estimates are of the two forms."""
    (one, _) = ranks.processes(2, exchange.steps, [16, 24, 16], 2, 5)
    assert [row["way"] for row in one] == ["DDP", "taken", "gather", "reduce"]
    assert all(row["p20"] <= row["median"] <= row["p80"] and row["threads"] == 1 for row in one)
    assert [row["estimate"] is not None for row in one] == [False, False, True, True]
    assert one[0]["forms"] == ["gather", "gather"] and one[0]["widths"] == [16, 24, 16]


def test_counts():
    """By hand, for one layer of 32 inputs and 64 outputs, of 4 ranks with 6 rows each: floats are 4 bytes, and a rank
    has a quarter of what it gathers. The rule takes what the exchange would."""
    (row,) = exchange.count((32, 64), (4,), 6)
    products, part = 2 * 6 * 32 * 64, 3 / 4 * 4
    assert row["reduce"] == {"flops": products, "bytes": 2 * part * 32 * 64}
    assert row["gather"] == {"flops": 4 * products, "bytes": part * 24 * (32 + 64)}
    assert row["share"] == {"flops": products, "bytes": part * (24 * 32 + 6 * 64 + 32 * 64)}
    assert row["cpu"] == row["cuda"] == ["reduce"]  # 24 rows are more than a quarter of 32
    (row,) = exchange.count((64, 64), (2,), 2)
    assert row["cpu"] == row["cuda"] == ["gather"]
    assert exchange.table([row]).splitlines()[-1].endswith("| gather | gather |")
