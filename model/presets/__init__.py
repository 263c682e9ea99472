"""The paper's three models: their configurations at full and at tiny scale, and model folders of them."""
