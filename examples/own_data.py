"""Your own orders: from a data frame to recommendations for somebody who has never been seen.

    python examples/own_data.py [ORDERS.csv] [section.field=value ...]

The file needs a customer, a product, the product's name, a time and a shop in each row; without one a small file of
garden shops is made. Shops are the clients, and the model is cut between each of them and a server.
"""

import random
import sys
from datetime import date, timedelta
from pathlib import Path

import polars as pl

import pplr

PLANTS = "Ash Alder Aspen Beech Birch Box Cedar Cherry Elm Fir Hazel Holly Larch Lime Maple Oak Pine Rowan Spruce Yew"


def make_orders() -> pl.DataFrame:
    """Make orders of three shops whose customers go on from a plant to one of its neighbours in the list."""
    draw, names, rows = random.Random(0), PLANTS.split(), []
    for customer in range(120):
        place, day = draw.randrange(len(names)), date(2024, 1, 1)
        for _ in range(draw.randint(5, 9)):
            rows.append((f"c{customer}", f"p{place}", names[place], day.isoformat(), f"shop {customer % 3}"))
            place, day = (place + draw.choice((1, 1, 2))) % len(names), day + timedelta(days=7)
    return pl.DataFrame(rows, schema=["customer", "product", "name", "ordered", "shop"], orient="row")


def main(arguments: list[str]) -> None:
    """Train on the file, and recommend to a new customer of each shop."""
    files, settings = [own for own in arguments if "=" not in own], [own for own in arguments if "=" in own]
    orders = Path(files[0]) if files else Path("orders.csv")
    if not files:
        make_orders().write_csv(orders)

    columns = {"user": "customer", "item": "product", "title": "name", "timestamp": "ordered"}
    config = pplr.load_config(
        {
            "data": {
                "source": "table",
                "path": str(orders),
                "columns": columns,
                "partition": {"by": "column", "column": "shop"},
            },
            "backbone": {"name": "item_vectors", "keep_blocks": 2},
            "cut": {"input_layers": 1, "output_layers": 0},
            "training": {"batch_size": 8, "learning_rate": 5e-4, "ends_rate": 4, "local_epochs": 4},
            "federation": {"clients": 3, "rounds": 3},
        },
        settings,
    )
    data = pplr.load_data(config)
    for client, shop in zip(data.partition.names, data.partition.labels, strict=True):
        print(f"client {client}, {shop}: {len(data.users(client))} customers")

    run = pplr.train(config, "runs/examples/orders", resume=True)
    trained = [own for record in run.rounds for own in record["clients"].values()]
    up, down = (sum(own[way] for own in trained) for way in ("bytes_up", "bytes_down"))
    print(f"crossed the cut in training: {up:,} bytes up, {down:,} down")

    history = data.dataset.catalog.titles[:2]  # somebody whom no shop knows
    for client in data.partition.names:
        best = run.recommend(client, history=history, count=3)
        print(f"after {' and '.join(history)}, client {client} recommends:", [found.title for found in best])


if __name__ == "__main__":
    main(sys.argv[1:])
