"""What a method is written against: asks, clients, replies and what becomes of them."""
