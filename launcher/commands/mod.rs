//! One file a command. Each reads as a table of contents: resolve, act, print.

pub(crate) mod batch;
pub(crate) mod bench;
pub(crate) mod bench_rank;
pub(crate) mod cancel;
pub(crate) mod clusters;
pub(crate) mod completions;
pub(crate) mod convert;
pub(crate) mod doctor;
pub(crate) mod endpoint;
pub(crate) mod events;
pub(crate) mod generate;
pub(crate) mod inspect;
pub(crate) mod launch;
pub(crate) mod logs;
pub(crate) mod plan;
pub(crate) mod profiles;
pub(crate) mod render;
pub(crate) mod results;
pub(crate) mod resume;
pub(crate) mod score;
pub(crate) mod serve;
pub(crate) mod status;
pub(crate) mod supervise;
pub(crate) mod version;
pub(crate) mod wait;
pub(crate) mod worker;
