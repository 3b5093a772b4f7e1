"""From a model's name and tables of records to what a federation trains: rows, loss, shards and the public test."""
