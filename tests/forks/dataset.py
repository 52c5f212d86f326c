"""A fork that reads Pascal VOC: PYTHONPATH=. python tests/forks/dataset.py --data path/to/VOC2012"""
from pathlib import Path
from xml.etree import ElementTree

import engine
import finetune
from data import DetectionSet, Transform, coco_format


def voc(data: str, split: str, image_size=800, augment="none", seed=0, limit=None, **_) -> DetectionSet:
    images, objects, folder = [], [], Path(data)
    for i, name in enumerate((folder / f"ImageSets/Main/{split}.txt").read_text().split()):
        tree = ElementTree.parse(folder / f"Annotations/{name}.xml")
        size = {side: int(tree.findtext(f"size/{side}")) for side in ("width", "height")}
        images.append({"id": i, "file_name": f"{name}.jpg", **size})
        for thing in tree.iter("object"):
            x0, y0, x1, y1 = (float(thing.findtext(f"bndbox/{side}"))
                              for side in ("xmin", "ymin", "xmax", "ymax"))  # counted from 1
            objects.append((thing.findtext("name"), i, [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]))
    names = sorted({name for name, _, _ in objects})
    content = {"images": images, "categories": [{"id": i, "name": n} for i, n in enumerate(names)],
               "annotations": [{"category_id": names.index(name), "image_id": i, "bbox": box}
                               for name, i, box in objects]}
    transform = Transform(image_size, augment)
    return coco_format(folder / "JPEGImages", content, limit, name=data, transform=transform, seed=seed)


if __name__ == "__main__":
    engine.run_script(finetune.main, read_data=voc)
