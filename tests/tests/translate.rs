//! Every kernel and variant translates to every language that a driver may be given.

use awqua_shaders::{ALL, Elem, Reduce, Variant, compose};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};

fn parse(source: &str, label: &str) -> (naga::Module, ModuleInfo) {
    let module =
        naga::front::wgsl::parse_str(source).unwrap_or_else(|e| panic!("{label}: {}", e.emit_to_string(source)));
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{label}: {}", e.emit_to_string(source)));
    (module, info)
}

fn for_every_kernel(check: impl Fn(&str, Variant, &str, naga::Module, ModuleInfo)) {
    let mut checked = 0;
    for kernel in ALL {
        for variant in kernel.variants() {
            let label = kernel.label(variant);
            let source = compose(kernel, variant);
            let (module, info) = parse(&source, &label);
            check(&label, variant, &source, module, info);
            checked += 1;
        }
    }
    assert!(checked > ALL.len(), "there are kernels with variants");
}

#[test]
fn half_precision_and_subgroups_appear_only_where_asked_for() {
    for_every_kernel(|label, variant, source, _, _| {
        let coop = source.contains("enable wgpu_cooperative_matrix;");
        assert_eq!(source.contains("enable f16;"), variant.elem == Elem::F16 || coop, "{label}");
        assert_eq!(source.contains("subgroupAdd("), variant.reduce == Reduce::Subgroup, "{label}");
    });
}

#[test]
fn translates_to_spirv() {
    for_every_kernel(|label, _, _, module, info| {
        let words = naga::back::spv::write_vec(&module, &info, &naga::back::spv::Options::default(), None)
            .unwrap_or_else(|e| panic!("{label}: {e}"));
        assert!(words.len() > 100 && words[0] == 0x0723_0203, "{label}");
    });
}

#[test]
fn translates_to_metal() {
    let options = naga::back::msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
    for_every_kernel(|label, _, _, module, info| {
        let (text, _) = naga::back::msl::write_string(&module, &info, &options, &Default::default())
            .unwrap_or_else(|e| panic!("{label}: {e}"));
        assert!(text.contains("kernel void main_("), "{label}");
    });
}

#[test]
fn translates_to_hlsl() {
    for_every_kernel(|label, variant, source, module, info| {
        // Direct3D 12 has no such matrices, so no device there offers them.
        if source.contains("enable wgpu_cooperative_matrix;") {
            return;
        }
        let shader_model = match variant {
            Variant { elem: Elem::F16, .. } => naga::back::hlsl::ShaderModel::V6_2,
            Variant { reduce: Reduce::Subgroup, .. } => naga::back::hlsl::ShaderModel::V6_0,
            _ => naga::back::hlsl::ShaderModel::V5_1,
        };
        let options = naga::back::hlsl::Options {
            shader_model,
            special_constants_binding: Some(naga::back::hlsl::BindTarget::default()),
            ..Default::default()
        };
        let mut text = String::new();
        naga::back::hlsl::Writer::new(&mut text, &options, &Default::default())
            .write(&module, &info, None)
            .unwrap_or_else(|e| panic!("{label}: {e}"));
        assert!(text.contains("[numthreads("), "{label}");
    });
}

#[test]
fn translates_back_to_wgsl() {
    for_every_kernel(|label, _, _, module, info| {
        let text = naga::back::wgsl::write_string(&module, &info, naga::back::wgsl::WriterFlags::empty())
            .unwrap_or_else(|e| panic!("{label}: {e}"));
        parse(&text, label);
    });
}
