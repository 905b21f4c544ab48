//! On a real GPU, with NCCL; skipped without.

use std::time::{Duration, Instant};

use half::bf16;
use tensorwire::collectives::device::{Device, DeviceOptions, EngineChoice, Stream};
use tensorwire::{Communicator, Element, ReduceOp};

/// A stream of the first GPU; `None`, and a line that says so, where there is none.
fn gpu() -> Option<Stream> {
    match Device::cuda_count() {
        Ok(0) => println!("skipped: no GPU"),
        Ok(_) => match Device::cuda(0).and_then(|device| device.stream()) {
            Ok(stream) => return Some(stream),
            Err(e) => panic!("there is a GPU, but {e}"),
        },
        Err(e) => println!("skipped: no GPU ({e})"),
    }
    None
}

fn options(engine: EngineChoice) -> DeviceOptions {
    DeviceOptions { engine, ..Default::default() }
}

fn alone<T: Element>(stream: &Stream, engine: EngineChoice, values: &[T], doubled: &[T]) {
    let comm = Communicator::in_process(1).unwrap().pop().unwrap();
    let group = comm.on_device_with(&stream.device(), &options(engine)).unwrap();
    println!("{}: {}", T::DTYPE, group.engine());
    let n = values.len();
    let mut x = stream.upload(values).unwrap();
    group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
    let (mut gathered, mut part) = (stream.zeros::<T>(n).unwrap(), stream.zeros::<T>(n).unwrap());
    group.all_gather(&x, &mut gathered).unwrap();
    group.reduce_scatter(&gathered, &mut part, ReduceOp::Max).unwrap();
    let (mut exchanged, mut back) = (stream.zeros::<T>(n).unwrap(), stream.zeros::<T>(n).unwrap());
    group.all_to_all(&part, &mut exchanged).unwrap();
    group.gather(&exchanged, &mut back, 0).unwrap();
    group.broadcast(&mut back, 0).unwrap();
    let mut scaled = stream.upload(values).unwrap();
    group.all_reduce(&mut scaled, ReduceOp::PreScaledSum(2.0)).unwrap();
    let mut registered = group.alloc::<T>(stream, n).unwrap();
    registered.write(values).unwrap();
    group.reduce(&mut registered, ReduceOp::Average, 0).unwrap();
    group.barrier(stream).unwrap();
    group.synchronize().unwrap();
    let same = |got: Vec<T>, expected: &[T]| {
        assert_eq!(bytemuck::cast_slice::<T, u8>(&got), bytemuck::cast_slice::<T, u8>(expected));
    };
    same(back.to_vec().unwrap(), values);
    same(scaled.to_vec().unwrap(), doubled);
    same(registered.to_vec().unwrap(), values);
    group.close(tensorwire::Deadline::after(Duration::from_secs(30))).unwrap();
}

#[test]
fn collectives_of_one_rank_over_nccl_and_by_way_of_the_host() {
    let Some(stream) = gpu() else { return };
    let values: Vec<f32> = (0..3_000_001).map(|i| i as f32).collect();
    let doubled: Vec<f32> = values.iter().map(|x| 2.0 * x).collect();
    let small: Vec<bf16> = (0..100).map(|i| bf16::from_f32(i as f32)).collect();
    let small_doubled: Vec<bf16> = (0..100).map(|i| bf16::from_f32(2.0 * i as f32)).collect();
    for engine in [EngineChoice::Nccl, EngineChoice::Staged] {
        alone(&stream, engine, &values, &doubled);
        alone(&stream, engine, &small, &small_doubled);
    }
}

#[test]
fn two_ranks_of_one_gpu_go_by_way_of_the_host() {
    let Some(stream) = gpu() else { return };
    let device = stream.device();
    crate::common::threads(2, &tensorwire::Options::default(), |comm| {
        let stream = device.stream().unwrap();
        let group = comm.on_device(&device).unwrap();
        println!("{}", group.engine());
        let len = 5_000_003;
        let mut x = stream.upload(&vec![comm.rank() as f32 + 1.0; len]).unwrap();
        group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        group.synchronize().unwrap();
        assert_eq!(x.to_vec().unwrap(), vec![3.0; len]);
    });
}

#[test]
fn calls_are_captured_in_a_graph() {
    use tensorwire::collectives::device::cudarc::driver::sys::{
        CUgraphInstantiate_flags, CUstreamCaptureMode,
    };
    let Some(stream) = gpu() else { return };
    let comm = Communicator::in_process(1).unwrap().pop().unwrap();
    let group = comm.on_device_with(&stream.device(), &options(EngineChoice::Nccl)).unwrap();
    let mut x = stream.upload(&[1f32; 1000]).unwrap();
    // Connections are made before, as NCCL recommends.
    group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
    group.synchronize().unwrap();
    let cuda = stream.as_cuda().unwrap();
    cuda.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
    group.all_reduce(&mut x, ReduceOp::PreScaledSum(2.0)).unwrap();
    group.all_reduce(&mut x, ReduceOp::PreScaledSum(2.0)).unwrap();
    let graph = cuda.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    group.follow(&stream).unwrap();
    group.synchronize().unwrap();
    assert_eq!(x.to_vec().unwrap(), [64.0; 1000]);
}

/// What a call costs the host, beside the same of many in one group: printed, not judged.
#[test]
fn what_a_launch_costs() {
    let Some(stream) = gpu() else { return };
    let comm = Communicator::in_process(1).unwrap().pop().unwrap();
    let group = comm.on_device_with(&stream.device(), &options(EngineChoice::Nccl)).unwrap();
    let mut x = stream.zeros::<f32>(1024).unwrap();
    for (what, calls) in [("the first 100", 100u32), ("1000 more", 1000)] {
        let start = Instant::now();
        for _ in 0..calls {
            group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        }
        println!("{what}: {:?} a call", start.elapsed() / calls);
        group.synchronize().unwrap();
    }
    let mut many: Vec<_> = (0..100).map(|_| stream.zeros::<f32>(1024).unwrap()).collect();
    let start = Instant::now();
    group.group(|g| many.iter_mut().try_for_each(|x| g.all_reduce(x, ReduceOp::Sum))).unwrap();
    println!("100 in a group: {:?} a call", start.elapsed() / 100);
    group.synchronize().unwrap();
}
