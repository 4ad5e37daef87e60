"""The torch-free runtime: from a face and a prompt to a picture, over engines of any backend.

Files in the order of one request: `request` (what is asked), `images` and `face` (the face),
`tokenizer` and `conditioning` (what the UNet is told), `schedule`, `guidance`, `manipulation`
(host scalars per step), `sampling` (from noise to latents), `stages` and `pipeline` (all of it in
order), `picture_file` (the file).
"""
