"""How a model's weights are held, differentiated and stepped: one protocol, several backends."""
