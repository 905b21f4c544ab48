//! How fast the reduction kernels are, alone and on one thread: every instruction set that this processor
//! has, at 2 and at 8 sources, with little data, and with data in the first-level cache, in the second-level one, in the
//! last-level one and in memory.
//!
//! ```text
//! cargo bench --bench kernels                            # all, in a few minutes
//! cargo bench --bench kernels -- 'bf16.*/avx512'         # some
//! ```
//!
//! A benchmark's name is `dtype x sources/bytes of a source/instruction set`; its throughput counts the bytes
//! read from all sources and those written.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use tensorwire::collectives::reduce::Kernels;
use tensorwire::{DType, ReduceOp};

const DTYPES: [DType; 6] = [DType::F32, DType::BF16, DType::F16, DType::F8E4M3, DType::F8E5M2, DType::I32];

/// Bytes of one source: less than a block of the kernels; with up to 8 sources and the destination, within 36 KiB, within
/// 576 KiB, within 9 MiB; and, at 2 sources already, beyond any last-level cache.
const SIZES: [(&str, usize); 5] =
    [("120", 120), ("4K", 4 << 10), ("64K", 64 << 10), ("1M", 1 << 20), ("64M", 64 << 20)];

fn kernels(criterion: &mut Criterion) {
    for dtype in DTYPES {
        for sources in [2, 8] {
            let mut group = criterion.benchmark_group(format!("{dtype} x {sources}"));
            for (label, bytes) in SIZES {
                group.throughput(Throughput::Bytes((bytes * (sources + 1)) as u64));
                group.sampling_mode(if bytes > 1 << 20 { SamplingMode::Flat } else { SamplingMode::Auto });
                let mut operands = Operands::new(bytes, sources);
                for kernels in Kernels::available() {
                    group.bench_function(BenchmarkId::new(label, kernels.name()), |bencher| {
                        bencher.iter(|| operands.reduce(kernels, dtype));
                    });
                }
            }
            group.finish();
        }
    }
}

/// The end of a row: `add_rms_norm dtype x sources/width/instruction set`. Its throughput counts the sources, the
/// residual read and written, the weight and the output.
fn add_rms_norm(criterion: &mut Criterion) {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        for sources in [1, 2, 8] {
            let mut group = criterion.benchmark_group(format!("add_rms_norm {dtype} x {sources}"));
            for width in [768, 4096, 8192] {
                let bytes = width * dtype.size();
                group.throughput(Throughput::Bytes((bytes * (sources + 4)) as u64));
                let (mut operands, mut residual) = (Operands::new(bytes, sources), vec![0u64; bytes / 8]);
                for kernels in Kernels::available() {
                    group.bench_function(BenchmarkId::new(width.to_string(), kernels.name()), |bencher| {
                        bencher.iter(|| operands.add_rms_norm(kernels, dtype, &mut residual));
                    });
                }
            }
            group.finish();
        }
    }
}

/// The destination and the sources of one reduction: words, and so aligned for every type, but to cache lines
/// no more than what a caller's allocator gives.
struct Operands {
    destination: Vec<u64>,
    sources: Vec<Vec<u64>>,
}

impl Operands {
    fn new(bytes: usize, sources: usize) -> Operands {
        // Bits that are a normal number in every type, small enough that no sum of 8 overflows.
        let words = |_| vec![0x3030_3030_3030_3030; bytes / 8];
        Operands { destination: vec![0; bytes / 8], sources: (0..sources).map(words).collect() }
    }

    fn reduce(&mut self, kernels: &Kernels, dtype: DType) {
        let Some(kernel) = kernels.get(dtype, ReduceOp::Sum) else {
            unreachable!("every table has a sum of every type")
        };
        let sources: Vec<*const u8> = self.sources.iter().map(|s| s.as_ptr().cast()).collect();
        let count = size_of_val(&self.destination[..]) / dtype.size();
        // SAFETY: (1) every source and the destination are `count` elements long and aligned for any type;
        // (2) they are allocations of their own; (3) `available` lists only what this processor runs.
        unsafe {
            kernel(self.destination.as_mut_ptr().cast(), sources.as_ptr(), sources.len(), count, 1.0);
        }
    }
}

impl Operands {
    /// The first source is the weight too.
    fn add_rms_norm(&mut self, kernels: &Kernels, dtype: DType, residual: &mut [u64]) {
        let Some(kernel) = kernels.add_rms_norm(dtype) else { unreachable!("every table has these types") };
        let sources: Vec<*const u8> = self.sources.iter().map(|s| s.as_ptr().cast()).collect();
        let (out, width) = (self.destination.as_mut_ptr().cast(), size_of_val(residual) / dtype.size());
        // SAFETY: as for `reduce`; the residual is another allocation, and as long.
        unsafe {
            let residual = residual.as_mut_ptr().cast();
            kernel(out, residual, sources.as_ptr(), sources.len(), sources[0], width, 1e-5);
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .without_plots()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(200));
    targets = kernels, add_rms_norm
}
criterion_main!(benches);
