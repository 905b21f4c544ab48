//! GPUs that tell neither their memory nor their speed where this program looks: in PCI's registers, and in the files of
//! NCCL and hwloc.
//!
//! By NVIDIA's numbers for its devices (pci-ids.ucw.cz). Memory is what `nvidia-smi` reports as the total; speeds are
//! those of NVIDIA's data sheets, for dense matrices: TF32 as f32 where there is TF32. Where a data sheet gives them with
//! sparsity alone (H100, H200), it is half of that; products of floats accumulate in f32 (RTX 4090: the Ada white
//! paper's appendix), and B200 is the one of HGX.

use super::{DeviceModel, Kind, Tflops};

/// Number, name, MiB of memory, GB/s of it, compute capability, NVLinks to switches, and TFLOP/s in f32, f16, f8 and i8.
type Row = (u32, &'static str, u64, f64, u32, u32, [f64; 4]);

const NVIDIA: [Row; 21] = [
    (0x1db1, "Tesla V100-SXM2-16GB", 16_384, 900.0, 70, 6, [15.7, 125.0, 0.0, 0.0]),
    (0x1db4, "Tesla V100-PCIE-16GB", 16_384, 900.0, 70, 0, [14.0, 112.0, 0.0, 0.0]),
    (0x1db5, "Tesla V100-SXM2-32GB", 32_768, 900.0, 70, 6, [15.7, 125.0, 0.0, 0.0]),
    (0x1db6, "Tesla V100-PCIE-32GB", 32_768, 900.0, 70, 0, [14.0, 112.0, 0.0, 0.0]),
    (0x1db8, "Tesla V100-SXM3-32GB", 32_768, 900.0, 70, 6, [15.7, 125.0, 0.0, 0.0]),
    (0x1eb8, "Tesla T4", 15_360, 320.0, 75, 0, [8.1, 65.0, 0.0, 130.0]),
    (0x20b0, "A100-SXM4-40GB", 40_960, 1555.0, 80, 12, [156.0, 312.0, 0.0, 624.0]),
    (0x20b2, "A100-SXM4-80GB", 81_920, 2039.0, 80, 12, [156.0, 312.0, 0.0, 624.0]),
    (0x20b5, "A100 80GB PCIe", 81_920, 1935.0, 80, 0, [156.0, 312.0, 0.0, 624.0]),
    (0x20f1, "A100-PCIE-40GB", 40_960, 1555.0, 80, 0, [156.0, 312.0, 0.0, 624.0]),
    (0x2235, "A40", 46_068, 696.0, 86, 0, [74.8, 149.7, 0.0, 299.3]),
    (0x2236, "A10", 23_028, 600.0, 86, 0, [62.5, 125.0, 0.0, 250.0]),
    (0x2329, "H20", 97_871, 4000.0, 90, 18, [74.0, 148.0, 296.0, 296.0]),
    (0x2330, "H100 80GB HBM3", 81_559, 3352.0, 90, 18, [494.0, 989.0, 1979.0, 1979.0]),
    (0x2331, "H100 PCIe", 81_559, 2039.0, 90, 0, [378.0, 756.0, 1513.0, 1513.0]),
    (0x2335, "H200", 143_771, 4800.0, 90, 18, [494.0, 989.0, 1979.0, 1979.0]),
    (0x26b5, "L40", 46_068, 864.0, 89, 0, [90.5, 181.0, 362.0, 362.0]),
    (0x26b9, "L40S", 46_068, 864.0, 89, 0, [183.0, 362.0, 733.0, 733.0]),
    (0x27b8, "L4", 23_034, 300.0, 89, 0, [60.0, 121.0, 242.0, 242.0]),
    (0x2684, "GeForce RTX 4090", 24_564, 1008.0, 89, 0, [82.6, 165.2, 330.3, 660.6]),
    (0x2901, "B200", 183_359, 8000.0, 100, 18, [1125.0, 2250.0, 4500.0, 4500.0]),
];

/// The PCI vendor number of the devices above.
pub(super) const VENDOR: u32 = 0x10de;

/// A GPU of NVIDIA, and its NVLinks where switches join them.
pub(super) fn nvidia(device: u32) -> Option<(DeviceModel, u32)> {
    let (_, name, mib, gbps, sm, links, tflops) = NVIDIA.iter().find(|row| row.0 == device)?;
    let [f32, f16, f8, i8] = tflops.map(|n| (n > 0.0).then_some(n));
    let plain = DeviceModel::new(*name, Kind::Gpu, Some(mib << 20));
    let tflops = Tflops { f32, f16, f8, i8 };
    Some((DeviceModel { memory_gbps: Some(*gbps), tflops, sm: Some(*sm), ..plain }, *links))
}

/// What one NVLink carries each way in GB/s, by compute capability, as NCCL counts it (`src/graph/topo.h`).
pub(super) fn nvlink_gbps(sm: u32) -> f64 {
    match sm {
        100.. => 40.1,
        90.. => 20.6,
        // Those of workstations.
        86 => 12.0,
        70.. => 20.0,
        _ => 18.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_known_by_their_number() {
        let (h100, links) = nvidia(0x2330).unwrap();
        assert_eq!((&*h100.name, h100.memory_bytes, links), ("H100 80GB HBM3", Some(81_559 << 20), 18));
        assert_eq!((h100.tflops.of_bits(8), h100.tflops.of_bits(16)), (Some(1979.0), Some(989.0)));
        let (v100, _) = nvidia(0x1db1).unwrap();
        assert_eq!((v100.tflops.f8, v100.tflops.of_bits(8)), (None, Some(125.0)));
        assert_eq!(nvidia(0), None);
        assert_eq!(
            [60, 70, 80, 86, 90, 100, 120].map(nvlink_gbps),
            [18.0, 20.0, 20.0, 12.0, 20.6, 40.1, 40.1]
        );
    }
}
