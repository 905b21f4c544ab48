//! NCCL's C interface, as far as it is used here: written from the documentation of NCCL's API and held to `nccl.h` by
//! the sizes and offsets below.

use std::ffi::{c_char, c_int, c_uint, c_void};

use tensorwire_core::{DType, ReduceOp};

/// `ncclComm_t`.
pub(crate) type RawComm = *mut c_void;
/// `cudaStream_t`.
pub(crate) type RawStream = *mut c_void;
/// `ncclResult_t`.
pub(crate) type Code = c_int;

pub(crate) const SUCCESS: Code = 0;
pub(crate) const UNHANDLED_CUDA_ERROR: Code = 1;
pub(crate) const REMOTE_ERROR: Code = 6;
pub(crate) const IN_PROGRESS: Code = 7;

/// `ncclRedOp_t`'s built-in operations.
pub(crate) const SUM: c_int = 0;
pub(crate) const UINT8: c_int = 1;
/// `ncclScalarHostImmediate`.
pub(crate) const HOST_IMMEDIATE: c_int = 1;

/// `ncclUniqueId`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct UniqueId(pub(crate) [u8; 128]);

/// `ncclConfig_t` as it was in 2.18. Later versions have appended to it, and take what a caller doesn't know for unset by the
/// size and version that it states.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// Nothing in 2.18; where later versions have a member that they reset for a caller of that version.
    padding: c_int,
}

/// `NCCL_CONFIG_UNDEF_INT`.
const UNSET: c_int = c_int::MIN;

impl Config {
    /// No call on the communicator blocks, so that it can be aborted at any time.
    pub(crate) fn nonblocking() -> Config {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: super::MINIMUM.code() as c_uint,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: std::ptr::null(),
            split_share: UNSET,
            padding: UNSET,
        }
    }
}

/// `ncclDataType_t`.
pub(crate) fn dtype(dtype: DType) -> c_int {
    match dtype {
        DType::I8 => 0,
        DType::U8 => UINT8,
        DType::I32 => 2,
        DType::U32 => 3,
        DType::I64 => 4,
        DType::U64 => 5,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::BF16 => 9,
        DType::F8E4M3 => 10,
        DType::F8E5M2 => 11,
    }
}

/// `ncclRedOp_t`; `None` where NCCL has none, or it is made for each communicator (a pre-scaled sum).
pub(crate) fn reduce_op(op: ReduceOp) -> Option<c_int> {
    match op {
        ReduceOp::Sum => Some(SUM),
        ReduceOp::Product => Some(1),
        ReduceOp::Max => Some(2),
        ReduceOp::Min => Some(3),
        ReduceOp::Average => Some(4),
        ReduceOp::PreScaledSum(_) | ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor => None,
    }
}

/// Makes the table: a field for each function, and what loads it.
macro_rules! table {
    ($($name:ident: $symbol:literal ($($type:ty),*) -> $result:ty),* $(,)? ; $($o_name:ident: $o_symbol:literal ($($o_type:ty),*) -> $o_result:ty),* $(,)?) => {
        /// NCCL's functions.
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct Table {
            $(pub(crate) $name: unsafe extern "C" fn($($type),*) -> $result,)*
            $(pub(crate) $o_name: Option<unsafe extern "C" fn($($o_type),*) -> $o_result>,)*
        }

        impl Table {
            /// Those of a loaded library; else the names that it lacks.
            ///
            /// # Safety
            /// 1. The library is NCCL, or one with functions of these names and NCCL's signatures.
            /// 2. It stays loaded.
            pub(crate) unsafe fn load(library: &libloading::Library) -> Result<Table, Vec<&'static str>> {
                let mut missing = Vec::new();
                $(
                    // SAFETY: (1) the function has this signature, which the caller vouches for; (2) its address is used
                    // while the library is loaded.
                    let $name = unsafe { library.get::<unsafe extern "C" fn($($type),*) -> $result>($symbol) };
                    let $name = $name.map(|symbol| *symbol).map_err(|_| missing.push($symbol)).ok();
                )*
                $(
                    // SAFETY: as above.
                    let $o_name = unsafe { library.get::<unsafe extern "C" fn($($o_type),*) -> $o_result>($o_symbol) };
                    let $o_name = $o_name.map(|symbol| *symbol).ok();
                )*
                match ($($name,)*) {
                    ($(Some($name),)*) => Ok(Table { $($name,)* $($o_name,)* }),
                    _ => Err(missing),
                }
            }
        }
    };
}

table! {
    get_version: "ncclGetVersion" (*mut c_int) -> Code,
    get_unique_id: "ncclGetUniqueId" (*mut UniqueId) -> Code,
    init_rank: "ncclCommInitRankConfig" (*mut RawComm, c_int, UniqueId, c_int, *mut Config) -> Code,
    finalize: "ncclCommFinalize" (RawComm) -> Code,
    destroy: "ncclCommDestroy" (RawComm) -> Code,
    abort: "ncclCommAbort" (RawComm) -> Code,
    split: "ncclCommSplit" (RawComm, c_int, c_int, *mut RawComm, *mut Config) -> Code,
    async_error: "ncclCommGetAsyncError" (RawComm, *mut Code) -> Code,
    error_string: "ncclGetErrorString" (Code) -> *const c_char,
    last_error: "ncclGetLastError" (RawComm) -> *const c_char,
    create_pre_mul_sum: "ncclRedOpCreatePreMulSum" (*mut c_int, *mut c_void, c_int, c_int, RawComm) -> Code,
    destroy_op: "ncclRedOpDestroy" (c_int, RawComm) -> Code,
    all_reduce: "ncclAllReduce" (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> Code,
    broadcast: "ncclBroadcast" (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> Code,
    reduce: "ncclReduce" (*const c_void, *mut c_void, usize, c_int, c_int, c_int, RawComm, RawStream) -> Code,
    all_gather: "ncclAllGather" (*const c_void, *mut c_void, usize, c_int, RawComm, RawStream) -> Code,
    reduce_scatter: "ncclReduceScatter" (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> Code,
    send: "ncclSend" (*const c_void, usize, c_int, c_int, RawComm, RawStream) -> Code,
    recv: "ncclRecv" (*mut c_void, usize, c_int, c_int, RawComm, RawStream) -> Code,
    group_start: "ncclGroupStart" () -> Code,
    group_end: "ncclGroupEnd" () -> Code;
    mem_alloc: "ncclMemAlloc" (*mut *mut c_void, usize) -> Code,
    mem_free: "ncclMemFree" (*mut c_void) -> Code,
    register: "ncclCommRegister" (RawComm, *mut c_void, usize, *mut *mut c_void) -> Code,
    deregister: "ncclCommDeregister" (RawComm, *mut c_void) -> Code,
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// Offsets of a C compiler for `ncclConfig_t` in nccl.h: of 2.18.1, whose members are these, and of 2.32.3, which has
    /// appended others.
    #[test]
    fn the_configuration_is_laid_out_as_in_nccl_h() {
        assert_eq!(offset_of!(Config, size), 0);
        assert_eq!(offset_of!(Config, magic), 8);
        assert_eq!(offset_of!(Config, version), 12);
        assert_eq!(offset_of!(Config, blocking), 16);
        assert_eq!(offset_of!(Config, cga_cluster_size), 20);
        assert_eq!(offset_of!(Config, min_ctas), 24);
        assert_eq!(offset_of!(Config, max_ctas), 28);
        assert_eq!(offset_of!(Config, net_name), 32);
        assert_eq!(offset_of!(Config, split_share), 40);
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!((size_of::<UniqueId>(), align_of::<UniqueId>()), (128, 1));
        assert_eq!(Config::nonblocking().version, 21801);
    }

    #[test]
    fn types_and_operations_have_nccls_numbers() {
        let numbers: Vec<_> = DType::ALL.into_iter().map(dtype).collect();
        assert_eq!(numbers, [7, 6, 9, 8, 10, 11, 0, 1, 2, 3, 4, 5]);
        let numbers: Vec<_> = ReduceOp::ALL.into_iter().map(reduce_op).collect();
        assert_eq!(numbers, [Some(0), Some(1), Some(3), Some(2), Some(4), None, None, None, None]);
    }
}
