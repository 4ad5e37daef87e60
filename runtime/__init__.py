"""The torch-free runtime: from a face and a prompt to a picture, over engines of any backend.

Files in the order of one request: `request` (what is asked), `images` and `face` (the face),
`tokenizer` and `conditioning` (what the UNet is told), `schedule`, `guidance`, `manipulation`
(host scalars per step), `noise`, `job` (all of these for one picture), `denoise` (the loop),
`advance` (guidance and the scheduler's step), `trace` (what callbacks see), `png` (the file).
"""
