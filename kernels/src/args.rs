//! How arguments reach a kernel: one `#[repr(C)]` struct by value, declared once here in Rust. The C++ side of it, `cuda/args.h`, is
//! written from these declarations by [`c_header`], so that the two cannot differ.

use std::fmt::Write as _;
use std::marker::PhantomData;

/// An address in the device's memory, or 0 for "none" where a field allows it.
#[repr(transparent)]
pub struct Ptr<T> {
    pub address: u64,
    /// Only a number to the host, so any thread may have it.
    element: PhantomData<fn() -> T>,
}

impl<T> Ptr<T> {
    pub const NULL: Self = Self::new(0);

    pub const fn new(address: u64) -> Self {
        Self { address, element: PhantomData }
    }
}

impl<T> Clone for Ptr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ptr<T> {}

impl<T> std::fmt::Debug for Ptr<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.address)
    }
}

/// The bits of a bfloat16 in the device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// A type that is laid out alike in Rust and C++.
pub(crate) trait CType {
    /// The declaration of a field of this type.
    fn declare(name: &str) -> String;
}

macro_rules! c_types {
    ($($rust:ty = $c:literal)*) => {$(
        impl CType for $rust {
            fn declare(name: &str) -> String {
                format!("{} {name}", $c)
            }
        }
        impl CType for Ptr<$rust> {
            fn declare(name: &str) -> String {
                format!("{}* {name}", $c)
            }
        }
    )*};
}
pub(crate) use c_types;

c_types! { u32 = "unsigned" u64 = "unsigned long long" f32 = "float" Bf16 = "bf16" }

impl<T: CType, const N: usize> CType for [T; N] {
    fn declare(name: &str) -> String {
        T::declare(&format!("{name}[{N}]"))
    }
}

/// A struct that kernels take or read. It has no padding, so all its bytes are initialised.
pub(crate) trait Layout: Copy {
    const NAME: &'static str;
    fn declaration() -> String;
}

macro_rules! layout {
    ($($(#[doc = $doc:literal])* $name:ident {
        $($(#[doc = $field_doc:literal])* $field:ident: $type:ty,)*
    })*) => {$(
        $(#[doc = $doc])*
        #[derive(Clone, Copy, Debug)]
        #[repr(C)]
        pub struct $name {
            $($(#[doc = $field_doc])* pub $field: $type,)*
        }

        const _: () = assert!(0 $(+ size_of::<$type>())* == size_of::<$name>(), "the struct has padding");

        impl $crate::args::Layout for $name {
            const NAME: &'static str = stringify!($name);

            fn declaration() -> String {
                let comments: &[&[&str]] = &[$(&[$($field_doc),*]),*];
                let fields = [$(<$type as $crate::args::CType>::declare(stringify!($field))),*];
                $crate::args::declare(Self::NAME, &[$($doc),*], &fields, comments)
            }
        }
    )*
        /// The declarations of all these structs in C++, in this order.
        pub(crate) fn declarations() -> Vec<String> {
            vec![$(<$name as $crate::args::Layout>::declaration()),*]
        }
    };
}
pub(crate) use layout;

pub(crate) fn declare(name: &str, docs: &[&str], fields: &[String], comments: &[&[&str]]) -> String {
    let mut text = String::new();
    for line in docs {
        let _ = writeln!(text, "//{line}");
    }
    let _ = writeln!(text, "struct {name} {{");
    for (field, comments) in fields.iter().zip(comments) {
        for line in *comments {
            let _ = writeln!(text, "    //{line}");
        }
        let _ = writeln!(text, "    {field};");
    }
    text + "};\n"
}

/// `cuda/args.h`.
pub fn c_header() -> String {
    let constants: String = crate::ops::CONSTANTS
        .iter()
        .map(|(name, value)| format!("static constexpr unsigned {name} = {value}u;\n"))
        .collect();
    format!(
        "// Written by `cargo run -p nemotron-kernels --bin compile-kernels` from src/ops.rs: change it there.\n#pragma once\n\n{constants}\n{}",
        crate::ops::declarations().join("\n")
    )
}
