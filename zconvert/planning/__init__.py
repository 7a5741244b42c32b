"""What a conversion will cost and whether it will pay: arithmetic on headers, config.json and data of a device."""
