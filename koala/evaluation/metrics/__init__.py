"""What is measured of pictures: `catalogue` names all metrics, the other modules compute them."""
