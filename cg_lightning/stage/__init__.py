"""What is installed on a LightningModule for the time of one stage."""
