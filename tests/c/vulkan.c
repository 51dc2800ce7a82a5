/* A host that renders with Vulkan hands its device over: the same tokens as on a device of the library's own, while it
 * works on the queue itself, and everything in the end destroyed in the right order: vulkan MODEL */
#define _POSIX_C_SOURCE 200112L
#include <pthread.h>
#include <vulkan/vulkan.h>

#include "check.h"

#define VK(call) CHECK((call) == VK_SUCCESS)

/* ---- the renderer ---- */

struct renderer {
    VkInstance instance;
    VkPhysicalDevice physical_device;
    VkDevice device;
    VkQueue queues[2];
    uint32_t family, n_queues, flags;
    pthread_mutex_t mutex;
    unsigned char uuid[VK_UUID_SIZE];
    /* Written under the mutex, or by the thread that ticks. */
    int locked, locks, released;
};

static uint32_t api_version(int old) {
    return old ? VK_API_VERSION_1_1 : VK_API_VERSION_1_2;
}

/* With everything the device has of what the library can make use of, or with nothing at all. */
static int make(struct renderer *r, int plain) {
    static const float PRIORITIES[2] = { 1.0f, 0.5f };
    VkApplicationInfo application = { VK_STRUCTURE_TYPE_APPLICATION_INFO, NULL, "test", 1, "test", 1, 0 };
    VkInstanceCreateInfo instance = { VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO, NULL, 0, NULL, 0, NULL, 0, NULL };
    VkPhysicalDeviceSubgroupSizeControlFeatures subgroups;
    VkPhysicalDevice16BitStorageFeatures storage;
    VkPhysicalDeviceVulkan12Features core;
    VkPhysicalDeviceFeatures2 features;
    VkPhysicalDeviceIDProperties ids;
    VkPhysicalDeviceProperties2 properties;
    VkQueueFamilyProperties families[8];
    VkDeviceQueueCreateInfo queue = { VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, NULL, 0, 0, 0, PRIORITIES };
    VkDeviceCreateInfo device = { VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO, NULL, 0, 1, NULL, 0, NULL, 0, NULL, NULL };
    static const char *const EXTENSIONS[] = { VK_EXT_SUBGROUP_SIZE_CONTROL_EXTENSION_NAME };
    uint32_t count = 1, i;
    memset(r, 0, sizeof *r);
    application.apiVersion = api_version(plain);
    instance.pApplicationInfo = &application;
    if (vkCreateInstance(&instance, NULL, &r->instance) != VK_SUCCESS) {
        return 0;
    }
    if (vkEnumeratePhysicalDevices(r->instance, &count, &r->physical_device) < 0 || count == 0) {
        vkDestroyInstance(r->instance, NULL);
        return 0;
    }
    memset(&ids, 0, sizeof ids);
    memset(&properties, 0, sizeof properties);
    ids.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ID_PROPERTIES;
    properties.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2;
    properties.pNext = &ids;
    vkGetPhysicalDeviceProperties2(r->physical_device, &properties);
    memcpy(r->uuid, ids.deviceUUID, sizeof r->uuid);
    count = 8;
    vkGetPhysicalDeviceQueueFamilyProperties(r->physical_device, &count, families);
    for (i = 0; i < count; i++) {
        const VkQueueFlags needed = VK_QUEUE_GRAPHICS_BIT | VK_QUEUE_COMPUTE_BIT;
        if ((families[i].queueFlags & needed) == needed) {
            break;
        }
    }
    CHECK(i < count);
    r->family = i;
    r->n_queues = families[i].queueCount > 1 ? 2 : 1;
    queue.queueFamilyIndex = r->family;
    queue.queueCount = r->n_queues;
    device.pQueueCreateInfos = &queue;
    if (!plain) {
        memset(&subgroups, 0, sizeof subgroups);
        memset(&storage, 0, sizeof storage);
        memset(&core, 0, sizeof core);
        memset(&features, 0, sizeof features);
        subgroups.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES;
        storage.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES;
        core.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES;
        features.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2;
        storage.pNext = &subgroups;
        core.pNext = &storage;
        features.pNext = &core;
        vkGetPhysicalDeviceFeatures2(r->physical_device, &features);
        r->flags |= core.shaderFloat16 && storage.storageBuffer16BitAccess && storage.uniformAndStorageBuffer16BitAccess
                        ? AWQUA_VULKAN_F16
                        : 0;
        r->flags |= core.timelineSemaphore ? AWQUA_VULKAN_TIMELINE_SEMAPHORES : 0;
        r->flags |= subgroups.subgroupSizeControl ? AWQUA_VULKAN_SUBGROUPS : 0;
        device.pNext = &features;
        device.enabledExtensionCount = 1;
        device.ppEnabledExtensionNames = EXTENSIONS;
    }
    VK(vkCreateDevice(r->physical_device, &device, NULL, &r->device));
    for (i = 0; i < r->n_queues; i++) {
        vkGetDeviceQueue(r->device, r->family, i, &r->queues[i]);
    }
    pthread_mutex_init(&r->mutex, NULL);
    return 1;
}

static void destroy(struct renderer *r) {
    vkDestroyDevice(r->device, NULL);
    vkDestroyInstance(r->instance, NULL);
    pthread_mutex_destroy(&r->mutex);
}

static void lock_queue(void *user) {
    struct renderer *r = user;
    pthread_mutex_lock(&r->mutex);
    CHECK(!r->locked);
    r->locked = 1;
    r->locks++;
}

static void unlock_queue(void *user) {
    struct renderer *r = user;
    CHECK(r->locked);
    r->locked = 0;
    pthread_mutex_unlock(&r->mutex);
}

static void released(void *user) {
    struct renderer *r = user;
    r->released++;
}

/* ---- answers ---- */

static awqua_model *load(const awqua_engine *engine, const char *path) {
    awqua_model *model = new_model(engine, path);
    OK(awqua_model_run(model));
    return model;
}

static void answer(awqua_session *session, char *text, size_t capacity) {
    awqua_request request = greedy(10);
    text[0] = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR("The old miller looked at Emma and said,"), &request));
    OK(awqua_session_run(session));
    CHECK(drain(session, text, capacity, 64) == AWQUA_STOP_MAX_TOKENS);
}

static awqua_session *session_on(const awqua_model *model) {
    awqua_session_desc desc = AWQUA_SESSION_DESC_INIT;
    awqua_session *session = NULL;
    desc.context = 64;
    desc.flags = AWQUA_SESSION_DETERMINISTIC;
    OK(awqua_session_create(model, &desc, &session));
    return session;
}

static awqua_vulkan shared(struct renderer *r, int plain) {
    awqua_vulkan vulkan = AWQUA_VULKAN_INIT;
    vulkan.flags = r->flags;
    vulkan.api_version = api_version(plain);
    vulkan.queue_family = r->family;
    vulkan.queue_index = r->n_queues - 1;
    vulkan.get_instance_proc_addr = (awqua_vulkan_get_proc_fn)(void (*)(void))vkGetInstanceProcAddr;
    vulkan.instance = r->instance;
    vulkan.physical_device = r->physical_device;
    vulkan.device = r->device;
    vulkan.released = released;
    vulkan.user = r;
    return vulkan;
}

/* A thread that submits to the queue all the time, as a renderer does. */
struct drawing {
    struct renderer *renderer;
    pthread_t thread;
    int stop, frames;
};

static void *draw(void *argument) {
    struct drawing *drawing = argument;
    struct renderer *r = drawing->renderer;
    int stop = 0;
    while (!stop) {
        lock_queue(r);
        VK(vkQueueSubmit(r->queues[r->n_queues - 1], 0, NULL, VK_NULL_HANDLE));
        drawing->frames++;
        stop = drawing->stop;
        unlock_queue(r);
    }
    return NULL;
}

static void answers(const char *path, int plain, const char *expected) {
    struct renderer first, second;
    struct drawing drawing;
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_vulkan vulkan, again;
    awqua_engine *engine = NULL;
    awqua_model *model;
    awqua_session *session;
    char text[256];
    int locks;
    CHECK(make(&first, plain) && make(&second, plain));
    vulkan = shared(&first, plain);
    vulkan.lock_queue = lock_queue;
    vulkan.unlock_queue = unlock_queue;
    desc.vulkan = &vulkan;
    desc.backend = plain ? AWQUA_BACKEND_AUTO : AWQUA_BACKEND_GPU;
    OK(awqua_engine_create(&desc, &engine));
    memset(&vulkan, 0, sizeof vulkan);
    drawing.renderer = &first;
    drawing.stop = drawing.frames = 0;
    CHECK(pthread_create(&drawing.thread, NULL, draw, &drawing) == 0);
    model = load(engine, path);
    session = session_on(model);
    answer(session, text, sizeof text);
    CHECK(!expected || strcmp(text, expected) == 0);
    lock_queue(&first);
    drawing.stop = 1;
    unlock_queue(&first);
    CHECK(pthread_join(drawing.thread, NULL) == 0);
    locks = first.locks - drawing.frames;
    CHECK(drawing.frames > 0 && locks > 10 && first.released == 0);

    /* The renderer is made anew: all goes over to its second device, and the first one is let go of. */
    again = shared(&second, plain);
    OK(awqua_engine_recover_vulkan(engine, &again));
    answer(session, text, sizeof text);
    CHECK(!expected || strcmp(text, expected) == 0);
    CHECK(first.released == 1 && second.released == 0 && second.locks == 0);
    destroy(&first);

    /* A loss that was forced is one of the library's own device only; the host's stays, and may be given again. */
    OK(awqua_engine_debug_lose_device(engine));
    EXPECT(AWQUA_ERR_DEVICE_LOST, awqua_engine_recover(engine));
    OK(awqua_engine_recover_vulkan(engine, &again));
    answer(session, text, sizeof text);
    CHECK(!expected || strcmp(text, expected) == 0);
    CHECK(second.released == 1);

    /* Frees in the wrong order. */
    OK(awqua_engine_free(engine));
    OK(awqua_model_free(model));
    CHECK(second.released == 1);
    OK(awqua_session_free(session));
    CHECK(second.released == 2);
    destroy(&second);
}

static void refusals(void) {
    struct renderer r;
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_engine *engine = NULL, *other = NULL;
    awqua_vulkan vulkan;
    int i;
    CHECK(make(&r, 1));
    desc.vulkan = &vulkan;
    for (i = 0; i < 8; i++) {
        vulkan = shared(&r, 1);
        desc.backend = AWQUA_BACKEND_GPU;
        desc.device = AWQUA_CSTR(i == 0 ? "llvmpipe" : "");
        switch (i) {
        case 0:
            break;
        case 1:
            vulkan.flags = 0x80;
            break;
        case 2:
            vulkan.api_version = VK_API_VERSION_1_0;
            break;
        case 3:
            vulkan.get_instance_proc_addr = NULL;
            break;
        case 4:
            vulkan.device = NULL;
            break;
        case 5:
            vulkan.lock_queue = lock_queue;
            break;
        case 6:
            desc.backend = AWQUA_BACKEND_CPU;
            break;
        default:
            vulkan.instance = NULL;
        }
        EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_engine_create(&desc, &engine));
    }
    vulkan = shared(&r, 1);
    vulkan.struct_size = 12;
    desc.backend = AWQUA_BACKEND_GPU;
    EXPECT(AWQUA_ERR_STRUCT_SIZE, awqua_engine_create(&desc, &engine));
    CHECK(r.released == 0 && !engine);
    other = cpu_engine();
    vulkan = shared(&r, 1);
    EXPECT(AWQUA_ERR_STATE, awqua_engine_recover_vulkan(other, &vulkan));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_engine_recover_vulkan(NULL, &vulkan));
    OK(awqua_engine_free(other));
    /* An engine on which nothing was loaded lets go, too. */
    OK(awqua_engine_create(&desc, &engine));
    CHECK(r.released == 0);
    OK(awqua_engine_free(engine));
    CHECK(r.released == 1);
    destroy(&r);
}

int main(int argc, char **argv) {
    struct renderer probe;
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_engine *engine = NULL;
    awqua_model *model;
    awqua_session *session;
    char expected[256];
    CHECK(argc == 2);
    if (!make(&probe, 1)) {
        printf("no GPU: there is no Vulkan device\n");
        return 0;
    }
    /* The plain path on the same adapter. */
    desc.backend = AWQUA_BACKEND_GPU;
    memcpy(desc.device_uuid, probe.uuid, sizeof desc.device_uuid);
    destroy(&probe);
    OK(awqua_engine_create(&desc, &engine));
    model = load(engine, argv[1]);
    session = session_on(model);
    answer(session, expected, sizeof expected);
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    CHECK(strlen(expected) > 10);
    answers(argv[1], 0, expected);
    /* Other kernels, whose words are their own. */
    answers(argv[1], 1, NULL);
    refusals();
    return 0;
}
