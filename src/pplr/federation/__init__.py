"""The method: aggregation, heating, personalisation, clients, server, rounds. Knows no network."""
