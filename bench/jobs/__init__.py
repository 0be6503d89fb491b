"""The jobs that shardwise itself runs under measurement: ordinary job files, as a user writes them."""
