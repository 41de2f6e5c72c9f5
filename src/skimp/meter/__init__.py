"""What serving costs, measured: speed (``speed``), accuracy (``quality``), and the calibration
that lets the cost model predict this engine on this machine (``calibrate``)."""
